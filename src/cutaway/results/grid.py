"""Grid: numbers over named axes, drawn as a heat map (patch sweeps, layer x head scores)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cutaway.core.errors import ResultError
from cutaway.core.result import Array, over
from cutaway.results import drawing
from cutaway.results.kind import Kind

if TYPE_CHECKING:
    import pandas

ROOM, HEIGHT, CELL = 860, 480, 30


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Grid(Kind, kind="grid"):
    """``values`` over two or three named ``axes``: (y, x), or (panel, y, x).

    Args:
        values: float, one axis per name; NaN where nothing was measured (drawn grey).
        axes: names of the dimensions, e.g. ("layer", "position").
        measure: what the numbers are ("normalised recovery"); ``unit`` is theirs.
        standard_error: of each value, where values are means over several pairs of prompts.
        scale: "diverging" around ``center`` for signed values, "sequential" for values that only grow.
    """

    values: Array = field(metadata=over(named_by="axes"))
    axes: tuple[str, ...]
    standard_error: Array | None = field(default=None, metadata=over(named_by="axes"))
    measure: str = "value"
    scale: str = "diverging"
    center: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.axes) not in (2, 3) or len(set(self.axes)) != len(self.axes):
            raise ResultError("a grid", f"its axes are {self.axes}", "give two or three different names")
        if self.scale not in ("diverging", "sequential"):
            raise ResultError(f"scale={self.scale!r}", "no such colour scale", "use 'diverging' or 'sequential'")

    def table(self) -> pandas.DataFrame:
        """One row per cell: the axes' labels, ``value`` and, where there is one, ``standard_error``."""
        names = ["values", *(["standard_error"] if self.standard_error is not None else [])]
        return self.long_table(*names).rename(columns={"values": "value"})

    def highlights(self) -> pandas.DataFrame:
        """Cells from the strongest to the weakest; missing ones last."""
        return self.table().sort_values("value", key=lambda v: (v - self.center).abs(), ascending=False, kind="stable")

    def spec(self, panel: Any = None) -> drawing.Spec:
        """The heat map; of a three-axis grid all panels side by side, or the one labelled ``panel``.

        The last axis runs to the right; an axis called "layer" rises, layer 0 at the bottom.
        """
        values = self.values if self.values.ndim == 3 else self.values[None]
        errors = None if self.standard_error is None else self.standard_error.reshape(values.shape)
        panels = self.along(self.axes[0]) if self.values.ndim == 3 else ("",)
        if panel is not None:
            if self.values.ndim == 2:
                raise ResultError(f"panel={panel!r}", "this grid has two axes and one panel")
            index = self.option("panel", panel, self.axes[0])
            values, panels = values[index : index + 1], (panel,)
            errors = None if errors is None else errors[index : index + 1]
        y_name, x_name = self.axes[-2:]
        y_labels, x_labels = self.along(y_name), self.along(x_name)
        across = _across(len(panels), x_labels)
        width = drawing.step(len(x_labels), ROOM / across, CELL)
        height = drawing.step(len(y_labels), HEIGHT / (2 if len(panels) > across else 1), CELL)
        signed = self.scale == "diverging"
        title = drawing.named(self.measure, self.unit)
        colors = drawing.color(title, values, signed, self.center, height * len(y_labels))
        rows = [
            {"panel": p, "x": j, "y": i, x_name: drawing.shown(x_labels[j]), y_name: drawing.shown(y_labels[i])}
            | {"value": drawing.finite(values[p, i, j]), "shown": self._shown(values, errors, (p, i, j))}
            for p, i, j in np.ndindex(values.shape)
        ]
        body = drawing.heat(
            x=drawing.axis(x_labels, drawing.named(x_name), width, horizontal=True),
            y=drawing.axis(y_labels, drawing.named(y_name), height, horizontal=False),
            colors=colors,
            tooltip=[y_name, x_name],
            width={"step": width},
            height={"step": height},
            rising=y_name == "layer",
        )
        if len(panels) > 1:
            body = drawing.panels(body, panels, drawing.named(self.axes[0]), across)
            if across > 1 and len(panels) % across:  # a shared axis would stand under the place that stays empty, too
                body["resolve"] = {"axis": {"x": "independent"}}
        subtitle = [*self.caption(), f"{self.axes[0]} {panel}" if panel is not None else ""]
        return drawing.document({"data": {"values": rows}, **body}, drawing.heading(self.title, *subtitle))

    @staticmethod
    def _shown(values: Array, errors: Array | None, cell: tuple[int, ...]) -> str:
        """A cell as a reader sees it who points at it."""
        value = drawing.digits(values[cell])
        return value if errors is None else f"{value} ± {drawing.digits(errors[cell])}"


def _across(panels: int, labels: Sequence[Any]) -> int:
    """Panels in a row: at most three, none alone in the last row of four, and as few as tokens need to be all named."""
    across = 2 if panels == 4 else min(panels, 3) or 1
    if any(isinstance(each, str) for each in labels):
        while across > 1 and drawing.step(len(labels), ROOM / across, CELL) < drawing.LABEL_PIXELS:
            across -= 1
    return across
