"""Table: named columns of numbers or strings, for what has no better shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cutaway.core.errors import ResultError, nearest
from cutaway.core.result import Array, columns_over
from cutaway.results import drawing
from cutaway.results.kind import Kind, cell_text

if TYPE_CHECKING:
    import pandas

ROWS, COLUMNS, LINE, GAP, LONGEST = 40, 10, 20, 26, 36
HEADER_PIXELS = 6.6  # bold letters are wider


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Table(Kind, kind="table"):
    """``columns`` of equal length [row], in order; ``units`` names the unit of those that have one."""

    columns: dict[str, Array] = field(default_factory=dict, metadata=columns_over("row"))
    units: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.units:
            if name not in self.columns:
                raise ResultError(f"unit of column {name!r}", "there is no such column", nearest(name, self.columns))

    def table(self) -> pandas.DataFrame:
        """The columns as they are."""
        import pandas

        return pandas.DataFrame(self.columns)

    def spec(self, rows: int = ROWS) -> drawing.Spec:
        """The first ``rows`` rows, set as text."""
        frame = self.table()
        shown = frame.iloc[:rows, :COLUMNS]
        cells: list[dict[str, Any]] = []
        left = 0.0
        for name in shown.columns:
            title = f"{name} ({self.units[name]})" if name in self.units else str(name)
            title = drawing.shown(title, LONGEST)
            texts = [drawing.shown(cell_text(each), LONGEST) for each in shown[name]]
            body = max((len(each) for each in texts), default=0) * drawing.CHARACTER_PIXELS
            width = max(body, len(title) * HEADER_PIXELS)
            right_hand = frame[name].dtype.kind in "if"
            x = left + (width if right_hand else 0.0)
            cells.append({"x": x, "y": -1, "cell": title, "right": right_hand, "head": True})
            cells += [
                {"x": x, "y": i, "cell": each, "right": right_hand, "head": False} for i, each in enumerate(texts)
            ]
            left += width + GAP
        return self._document(cells, max(left - GAP, 1.0), len(shown))

    def _document(self, cells: list[dict[str, Any]], width: float, lines: int) -> drawing.Spec:
        x_scale = {"domain": [0, width], "nice": False, "zero": False}
        y_scale = {"domain": [-1.5, lines - 0.5], "nice": False, "zero": False, "reverse": True}
        x: drawing.Spec = {"field": "x", "type": "quantitative", "scale": x_scale, "axis": None}
        y: drawing.Spec = {"type": "quantitative", "scale": y_scale, "axis": None}
        mark = {"type": "text", "baseline": "middle", "fontSize": 11, "style": "on_low"}
        text = {"x": x, "y": {"field": "y", **y}, "text": {"field": "cell", "type": "nominal"}}
        layers: list[drawing.Spec] = [
            {
                "transform": [{"filter": f"datum.head === {head} && datum.right === {right}"}],
                "mark": {**mark, "align": align, "fontWeight": weight},
                "encoding": text,
            }
            for head, weight in (("true", 600), ("false", 400))
            for right, align in (("true", "right"), ("false", "left"))
        ]
        layers.append({"mark": {"type": "rule", "style": "rule"}, "encoding": {"y": {"datum": -0.5, **y}}})
        frame = self.table()
        left_out = []
        if len(frame) > lines:
            left_out.append(f"the first {lines} of {len(frame):,} rows")
        if len(frame.columns) > COLUMNS:
            left_out.append(f"the first {COLUMNS} of {len(frame.columns)} columns")
        heading = drawing.heading(self.title, *self.caption(), " and ".join(left_out))
        body = {"data": {"values": cells}, "width": width, "height": (lines + 1) * LINE, "layer": layers}
        return drawing.document(body, heading)
