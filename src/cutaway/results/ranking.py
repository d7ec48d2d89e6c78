"""Ranking: things in order of a score: neurons, heads, layers, features, patches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cutaway.core.errors import ResultError, nearest
from cutaway.core.result import Array, columns_over, over
from cutaway.results import drawing
from cutaway.results.kind import Kind

if TYPE_CHECKING:
    import pandas

ORDERS = ("descending", "ascending", "absolute", "given")
BAR, WIDTH, BARS, BESIDE = 17, 420, 30, 46


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Ranking(Kind, kind="ranking"):
    """``items`` sorted by ``scores``; NaN scores come last, equal scores keep their order.

    Args:
        items: strings [item]; site strings ("L3.mlp.act[7]") wherever the thing is a place in the model.
        scores: float [item], in ``unit``.
        columns: more about each item, [item] each: numbers or strings.
        measure: what the score is ("log-probability increase").
        order: "descending", "ascending", "absolute" (largest size first) or "given" (leave as it is).
    """

    items: Array = field(metadata=over("item"))
    scores: Array = field(metadata=over("item"))
    columns: dict[str, Array] = field(default_factory=dict, metadata=columns_over("item"))
    measure: str = "score"
    order: str = "descending"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ORDERS:
            raise ResultError(f"order={self.order!r}", "no such order", f"use one of {', '.join(ORDERS)}")
        if self.labels:
            raise ResultError("labels of a ranking", "its items are their own labels", "use columns")
        if self.order != "given":
            key = {"descending": -self.scores, "ascending": self.scores, "absolute": -np.abs(self.scores)}[self.order]
            rearranged = self._picked(np.argsort(key, kind="stable"))
            for name, value in rearranged.items():
                object.__setattr__(self, name, value)

    def _picked(self, places: np.ndarray) -> dict[str, Array]:
        columns = {name: _fixed(each[places]) for name, each in self.columns.items()}
        return {"items": _fixed(self.items[places]), "scores": _fixed(self.scores[places]), "columns": columns}

    @property
    def sites(self) -> tuple[str, ...]:
        """The items in order, as an edit or an intervention takes them."""
        return tuple(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def top(self, k: int) -> Ranking:
        """The first ``k`` items as a ranking of their own; check and proof stay those of the whole."""
        return self.replace(**self._picked(np.arange(min(k, len(self)))), order="given")

    def table(self) -> pandas.DataFrame:
        """One row per item: item, score and the columns, in order."""
        import pandas

        clash = {"item", "score"} & self.columns.keys()
        columns = {f"{name}_" if name in clash else name: each for name, each in self.columns.items()}
        return pandas.DataFrame({"item": self.items, "score": self.scores, **columns})

    def spec(self, k: int = BARS, color: str = "", beside: str = "") -> drawing.Spec:
        """Bars of the first ``k`` items. ``color`` names a column of strings that colours them (default "kind" where
        there is one, else the sign), ``beside`` a column written next to the bars (default: the first other strings).
        """
        strings = [name for name, each in self.columns.items() if each.dtype == object]
        for name in (color, beside):
            if name and name not in self.columns:
                raise ResultError(
                    f"column {name!r}",
                    f"this ranking has {', '.join(self.columns) or 'none'}",
                    nearest(name, self.columns),
                )
        color = color or ("kind" if "kind" in strings else "")
        beside = beside or next((name for name in strings if name != color), "")
        shown = min(k, len(self))
        rows = []
        for i in range(shown):
            score = float(self.scores[i])
            row = {
                "y": i,
                "item": drawing.shown(self.items[i], 40),
                "value": drawing.finite(score),
                "shown": drawing.digits(score),
            }
            row["sign"] = "negative" if score < 0 else "positive"
            if color:
                row["color"] = str(self.columns[color][i])
            if beside:
                row["beside"] = drawing.shown(self.columns[beside][i], BESIDE)
            rows.append(row)
        y = {
            "field": "y",
            "type": "ordinal",
            "axis": drawing.axis([row["item"] for row in rows], "", BAR, False, longest=40),
        }
        y["axis"] |= {"domain": False, "ticks": False, "labelLimit": 300}
        x_axis = {
            "title": drawing.named(self.measure, self.unit),
            "grid": True,
            "domain": False,
            "format": "~g",
            "tickCount": 5,
        }
        x = {"field": "value", "type": "quantitative", "axis": x_axis}
        x["scale"] = {"domain": list(drawing.from_zero(self.scores[:shown])), "nice": True}
        place = {
            "y": y,
            "x": x,
            "tooltip": [
                {"field": "item", "type": "nominal"},
                {"field": "shown", "title": x_axis["title"], "type": "nominal"},
            ],
        }
        if color:
            legend = {"title": drawing.named(color)}
            layers = [
                {
                    "mark": {"type": "bar", "height": {"band": 0.74}},
                    "encoding": {**place, "color": {"field": "color", "type": "nominal", "legend": legend}},
                }
            ]
        else:
            layers = [
                {
                    "transform": [{"filter": f"datum.sign === '{sign}'"}],
                    "mark": {"type": "bar", "height": {"band": 0.74}, "style": sign},
                    "encoding": place,
                }
                for sign in ("positive", "negative")
            ]
        if beside:
            mark = {"type": "text", "align": "left", "dx": 10, "style": "faint", "fontSize": 10}
            layers.append(
                {
                    "mark": mark,
                    "encoding": {"y": y, "x": {"value": WIDTH}, "text": {"field": "beside", "type": "nominal"}},
                }
            )
        left_out = f"the first {shown} of {len(self):,}" if shown < len(self) else ""
        side = f"beside the bars: {beside.replace('_', ' ')}" if beside else ""
        heading = drawing.heading(self.title, *self.caption(), " · ".join(each for each in (left_out, side) if each))
        return drawing.document(
            {"data": {"values": rows}, "width": WIDTH, "height": {"step": BAR}, "layer": layers}, heading
        )


def _fixed(data: np.ndarray) -> np.ndarray:
    data.flags.writeable = False
    return data
