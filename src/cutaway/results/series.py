"""Series: curves over one axis: doses, circuit sizes, training checkpoints."""

from __future__ import annotations

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


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Series(Kind, kind="series"):
    """Lines ``y`` over ``x``; label ``line`` with their names.

    Args:
        x: finite numbers [x], in ``x_unit``; ``x_name`` says what they are.
        y: numbers [line, x], in ``unit``; NaN leaves a gap. ``measure`` says what they are.
        lo, hi: an interval around every number [line, x]; both or neither, NaN for none.
        log_x: draw x on a logarithmic axis.
        line_columns: more about each line, such as the area under it.
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
        names = [drawing.shown(each, 40) for each in self.along("line")]
        rows: list[dict[str, Any]] = []
        for i, j in np.ndindex(self.y.shape):
            row = {"line": names[i], "x": float(self.x[j]), "y": drawing.finite(self.y[i, j])}
            if self.lo is not None:
                row |= {"lo": drawing.finite(self.lo[i, j]), "hi": drawing.finite(self.hi[i, j])}
            rows.append(row)
        x_axis = {"title": drawing.named(self.x_name, self.x_unit), "grid": False, "tickCount": 8}
        x_axis |= drawing.number_format(self.x)
        y_axis = {"title": drawing.named(self.measure, self.unit), "domain": False, "tickCount": 6}
        y_axis |= drawing.number_format(self.y)
        x_scale = (
            {"type": "log", "nice": False, "padding": 8} if self.log_x else {"zero": False, "nice": False, "padding": 8}
        )
        x = {"field": "x", "type": "quantitative", "axis": x_axis, "scale": x_scale}
        # More lines than hues are shades of one ramp: their order is then their meaning.
        many = len(names) > HUES
        legend = (
            {"title": None, "symbolType": "stroke", "symbolStrokeWidth": 3, "symbolOpacity": 1}
            if len(names) > 1
            else None
        )
        color: drawing.Spec = {"field": "line", "type": "nominal", "sort": None, "legend": legend}
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
        layers.append({"mark": {"type": "line", "strokeWidth": 2}, "encoding": {**place, "y": y}})
        size = 36 if len(self.x) <= POINTS else 4
        layers.append(
            {
                "mark": {"type": "point", "filled": True, "size": size, "opacity": 1},
                "encoding": {**place, "y": y, "tooltip": tooltip},
            }
        )
        body = {"data": {"values": rows}, "width": WIDTH, "height": HEIGHT, "layer": layers}
        return drawing.document(body, drawing.heading(self.title, *self.caption()))
