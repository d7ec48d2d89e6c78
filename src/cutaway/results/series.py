"""Series: curves over one axis: doses, circuit sizes, training checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cutaway.core.errors import ResultError
from cutaway.core.result import Array, columns_over, over
from cutaway.results import drawing
from cutaway.results.kind import Kind

if TYPE_CHECKING:
    import pandas

WIDTH, HEIGHT, POINTS, HUES = 520, 300, 40, 7
DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [12, 3], [4, 2, 1, 2, 1, 2], [1, 3]]
"""Strokes of the lines in order, the first solid: where lines lie on each other, those below show through."""
STEPS = (1, 2, 5)  # ticks of a logarithmic axis, times powers of ten


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Series(Kind, kind="series"):
    """Lines ``y`` over ``x``; label ``line`` with their names.

    Args:
        x: finite numbers [x], in ``x_unit``; ``x_name`` says what they are.
        y: numbers [line, x], in ``unit``; NaN leaves a gap. ``measure`` says what they are.
        lo, hi: an interval around every number [line, x]; both or neither, NaN for none.
        log_x: draw x on a logarithmic axis.
        line_columns: more about each line, such as the area under it; numbers stand in the legend, NaN for none.
        interval: what lo and hi are ("smallest and largest of 5 draws").
        about: what else its readers need, such as the sizes of what was measured.
    """

    x: Array = field(metadata=over("x"))
    y: Array = field(metadata=over("line", "x"))
    lo: Array = field(default=None, metadata=over("line", "x"))
    hi: Array = field(default=None, metadata=over("line", "x"))
    x_name: str = "x"
    x_unit: str = ""
    measure: str = "value"
    log_x: bool = False
    interval: str = ""
    line_columns: dict[str, Array] = field(default_factory=dict, metadata=columns_over("line"))
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.lo is None) != (self.hi is None):
            raise ResultError("a series", "only one of lo and hi is given", "give both or neither")
        if not np.isfinite(self.x).all():
            raise ResultError("a series", "x holds a number that is not finite", "drop those places")
        if self.log_x and (self.x <= 0).any():
            raise ResultError("a series with log_x", f"x holds {self.x.min():g}", "x must be above zero")

    def table(self) -> pandas.DataFrame:
        """One row per line and x: ``line``, x, y, and lo and hi where given."""
        names = ["y"] if self.lo is None else ["y", "lo", "hi"]
        table = self.long_table(*names)
        table["x"] = np.tile(self.x, self.y.shape[0])
        return table

    def spec(self) -> drawing.Spec:
        """Lines with their intervals as bands."""
        names = self._names()
        rows: list[dict[str, Any]] = []
        for i, j in np.ndindex(self.y.shape):
            row = {"line": names[i], "x": float(self.x[j]), "y": drawing.finite(self.y[i, j])}
            if self.lo is not None:
                row |= {"lo": drawing.finite(self.lo[i, j]), "hi": drawing.finite(self.hi[i, j])}
            rows.append(row)
        x_axis = {"title": drawing.named(self.x_name, self.x_unit), "grid": False, "tickCount": 8}
        x_axis |= drawing.number_format(self.x) or ({"format": "~g"} if self.log_x else {})
        if self.log_x and len(self.x):
            ticks = _ticks(float(self.x.min()), float(self.x.max()))
            x_axis |= {"values": ticks, "tickCount": len(ticks), "labelOverlap": False}
        y_axis = {"title": drawing.named(self.measure, self.unit), "domain": False, "tickCount": 6}
        y_axis |= drawing.number_format(self.y)
        x_scale = (
            {"type": "log", "nice": False, "padding": 8} if self.log_x else {"zero": False, "nice": False, "padding": 8}
        )
        x = {"field": "x", "type": "quantitative", "axis": x_axis, "scale": x_scale}
        # More lines than hues are shades of one ramp: their order is then their meaning.
        many = len(names) > HUES
        legend = {"title": None, "symbolType": "stroke", "symbolStrokeWidth": 2, "symbolSize": 300, "symbolOpacity": 1}
        legend |= {"orient": "bottom", "columns": 1, "labelLimit": WIDTH, "offset": 12, "rowPadding": 0}
        color: drawing.Spec = {
            "field": "line",
            "type": "nominal",
            "sort": None,
            "legend": legend if len(names) > 1 else None,
        }
        color |= {"scale": {"domain": names, "range": "ordinal" if many else "category"}}
        color |= {"type": "ordinal"} if many else {}
        tooltip = [{"field": each, "type": "quantitative", "format": ".4g"} for each in ("x", "y", "lo", "hi")]
        tooltip = [{"field": "line", "type": "nominal"}, *(tooltip if self.lo is not None else tooltip[:2])]
        place = {"x": x, "color": color}
        y = {"field": "y", "type": "quantitative", "axis": y_axis, "scale": {"zero": False, "nice": True}}
        layers: list[drawing.Spec] = []
        if self.lo is not None:
            layers.append(
                {
                    "mark": {"type": "area", "opacity": 0.18, "line": False},
                    "encoding": {**place, "y": y | {"field": "lo"}, "y2": {"field": "hi"}},
                }
            )
        dash = {} if many or len(names) < 2 else {"strokeDash": color | {"scale": {"domain": names, "range": DASHES}}}
        layers.append({"mark": {"type": "line", "strokeWidth": 2}, "encoding": {**place, **dash, "y": y}})
        size = 36 if len(self.x) <= POINTS else 4
        layers.append(
            {
                "mark": {"type": "point", "filled": True, "size": size, "opacity": 1},
                "encoding": {**place, "y": y, "tooltip": tooltip},
            }
        )
        body = {"data": {"values": rows}, "width": WIDTH, "height": HEIGHT, "layer": layers}
        banded = self.lo is not None and bool(np.isfinite(self.lo).any())
        said = f"bands: {self.interval}" if banded and self.interval else ""
        return drawing.document(body, drawing.heading(self.title, *self.caption(), said))

    def _names(self) -> list[str]:
        """The lines' names, with the numbers of their columns."""
        numbers = {name: each for name, each in self.line_columns.items() if each.dtype.kind in "if"}
        return [
            " · ".join(
                [
                    drawing.shown(each, 40),
                    *(f"{name} {column[i]:.3g}" for name, column in numbers.items() if np.isfinite(column[i])),
                ]
            )
            for i, each in enumerate(self.along("line"))
        ]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high``: 1, 2, 5 times powers of ten, or powers alone where these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = STEPS if len(powers) <= 5 else STEPS[:1]
    return [value for p in powers for step in steps if low <= (value := float(f"{step}e{p}")) <= high]
