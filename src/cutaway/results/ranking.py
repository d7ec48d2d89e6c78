"""Ranking: things in order of a score: neurons, heads, layers, features, patches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cutaway.core.errors import ResultError, nearest
from cutaway.core.result import Array, columns_over, over
from cutaway.results import drawing
from cutaway.results.kind import Kind, cell_text

if TYPE_CHECKING:
    import pandas

ORDERS = ("descending", "ascending", "absolute", "given")
BAR, WIDTH, BARS = 17, 420, 30
LONGEST_ITEM, BESIDE = 40, 46


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
        for name in (color, beside):
            if name and name not in self.columns:
                found = f"this ranking has {', '.join(self.columns) or 'none'}"
                raise ResultError(f"column {name!r}", found, nearest(name, self.columns))
        strings = [name for name, each in self.columns.items() if each.dtype == object]
        color = color or ("kind" if "kind" in strings else "")
        beside = beside or next((name for name in strings if name != color), "")
        rows = self._rows(min(k, len(self)), color, beside)
        scores = self.scores[: len(rows)]
        value_title = drawing.named(self.measure, self.unit)
        names = drawing.axis([row["item"] for row in rows], "", BAR, horizontal=False, longest=LONGEST_ITEM)
        names |= {"domain": False, "ticks": False, "labelLimit": 300}
        y = {"field": "y", "type": "ordinal", "axis": names}
        numbers = {"title": value_title, "grid": True, "domain": False, "tickCount": 5} | drawing.number_format(scores)
        span = {"domain": list(drawing.from_zero(scores)), "nice": True}
        x = {"field": "value", "type": "quantitative", "axis": numbers, "scale": span}
        said = [{"field": "item", "type": "nominal"}, {"field": "shown", "title": value_title, "type": "nominal"}]
        place = {"y": y, "x": x, "tooltip": said}
        layers = [*_bars(place, color), *_words(y, beside)]
        left_out = f"the first {len(rows)} of {len(self):,}" if len(rows) < len(self) else ""
        body = {"data": {"values": rows}, "width": WIDTH, "height": {"step": BAR}, "layer": layers}
        return drawing.document(body, drawing.heading(self.title, *self.caption(), left_out))

    def _rows(self, count: int, color: str, beside: str) -> list[dict[str, Any]]:
        rows = []
        for i, score in enumerate(self.scores[:count].tolist()):
            row = {
                "y": i,
                "item": drawing.shown(self.items[i], LONGEST_ITEM),
                "sign": "negative" if score < 0 else "positive",
            }
            row |= {"value": drawing.finite(score), "shown": drawing.digits(score)}
            if color:
                row["color"] = str(self.columns[color][i])
            if beside:
                row["beside"] = cell_text(self.columns[beside][i], BESIDE)
            rows.append(row)
        return rows


def _bars(place: drawing.Spec, color: str) -> list[drawing.Spec]:
    """Bars coloured by a column or by sign, and the text of numbers that have no bar (NaN, infinity)."""
    bar: drawing.Spec = {"type": "bar", "height": {"band": 0.74}}
    without = {
        "transform": [{"filter": "!isValid(datum.value)"}],
        "mark": {"type": "text", "style": "faint", "align": "left", "dx": 4},
        "encoding": {"y": place["y"], "x": {"datum": 0}, "text": {"field": "shown", "type": "nominal"}},
    }
    if color:
        by = {"field": "color", "type": "nominal", "legend": {"title": drawing.named(color)}}
        return [{"mark": bar, "encoding": {**place, "color": by}}, without]
    by_sign: list[drawing.Spec] = [
        {"transform": [{"filter": f"datum.sign === '{sign}'"}], "mark": {**bar, "style": sign}, "encoding": place}
        for sign in ("positive", "negative")
    ]
    return [*by_sign, without]


def _words(y: drawing.Spec, beside: str) -> list[drawing.Spec]:
    """A column of text to the right of the bars, under its name."""
    if not beside:
        return []
    mark: drawing.Spec = {"type": "text", "align": "left", "dx": 12, "fontSize": 10}
    right = {"value": WIDTH}
    text: drawing.Spec = {"y": y, "x": right, "text": {"field": "beside", "type": "nominal"}}
    head: drawing.Spec = {"y": {"value": -7}, "x": right, "text": {"value": drawing.named(beside)}}
    return [
        {"mark": {**mark, "style": "faint"}, "encoding": text},
        {
            "transform": [{"filter": "datum.y === 0"}],
            "mark": {**mark, "style": "on_low", "fontSize": 11},
            "encoding": head,
        },
    ]


def _fixed(data: np.ndarray) -> np.ndarray:
    data.flags.writeable = False
    return data
