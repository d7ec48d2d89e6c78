"""The picture of a graph: rows from the inputs below to the output above, edges that pass between the nodes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cutaway.results import drawing
from cutaway.results.layout import Layout, columned, layered, ranks

if TYPE_CHECKING:
    from cutaway.results.graph import Graph

PLATE = 17.0  # height of a node with a name on it
DOT = 9.0  # width and height of a node in a column
WIDE = 520.0  # pixels that the widest row fills at least, by larger gaps
GAPS = (14.0, 48.0)  # between the nodes of a row, at least and at most
RISES = (34.0, 58.0)  # from row to row, at least and at most
DOT_RISES = (15.0, 44.0)
TALL = 1000.0  # pixels that rows share as long as none is too low
PITCHES = (12.0, 84.0)  # from column to column
COLUMNS = 70  # more columns than this: those alone where an edge ends
THINNEST, THICKEST = 0.5, 5.0
STRAND = 2.8  # pixels between edges that pass through one gap
FAINT = 0.02  # of the strongest edge: heads of weaker ones are not written beside them
MOST = 3  # heads that are written beside one pair of nodes
ENDS = ".[@"  # where a node's name may be cut
BESIDE = 10.0  # pixels between the names of rows, or the tokens of columns, and the nodes


@dataclass(frozen=True)
class _Frame:
    """The part of a graph that is drawn, and where.

    Attributes:
        kept: edges. used: nodes. ends: (source, target) of the edges, as places in ``used``.
        names: what stands on each node. row_names: by row, what its nodes' names have in common.
        columns: (x, token) of the columns; none in a drawing without.
    """

    kept: np.ndarray
    used: np.ndarray
    ends: list[tuple[int, int]]
    names: list[str]
    row_names: list[str]
    layout: Layout
    rise: float
    columns: list[tuple[float, str]]

    @property
    def margin(self) -> float:
        """Pixels beside the nodes that edges may take."""
        return float(self.layout.gap) if not self.columns else 0.0

    @property
    def left(self) -> float:
        """The left end of the drawing, where the names of rows begin."""
        longest = max((len(each) for each in self.row_names), default=0)
        return -self.margin - (longest * drawing.CHARACTER_PIXELS + BESIDE if longest else 0.0)

    @property
    def turned(self) -> bool:
        """Whether tokens stand upright because they are wider than their columns."""
        longest = max((len(each) for _, each in self.columns), default=0)
        return longest * drawing.CHARACTER_PIXELS > self.layout.gap + DOT - 2

    @property
    def below(self) -> float:
        """Pixels below the lowest nodes."""
        longest = max((len(each) for _, each in self.columns), default=0)
        high = longest * drawing.CHARACTER_PIXELS if self.turned else drawing.LABEL_PIXELS
        return PLATE / 2 + (high + BESIDE if self.columns else 0.0)


def picture(graph: Graph, edges: int) -> drawing.Spec:
    """The strongest ``edges`` edges and the nodes they join."""
    frame = _frame(graph, edges)
    rows = [*_ties(graph, frame), *_edges(graph, frame), *_nodes(graph, frame), *_words(graph, frame)]
    layers = _layers(graph, frame, {row["part"] for row in rows})
    top = float(frame.layout.row.max(initial=0)) * frame.rise + PLATE / 2
    body = {"data": {"values": rows}, "layer": layers, "height": round(top + frame.below, 1)}
    body["width"] = round(frame.layout.width + frame.margin - frame.left, 1)
    if not len(frame.used):
        body["data"] = {"values": []}
    return drawing.document(body, drawing.heading(graph.title, *graph.caption(), *_said(graph, frame)))


def _frame(graph: Graph, edges: int) -> _Frame:
    size = _sizes(graph)
    kept = np.sort(np.argsort(-size, kind="stable")[:edges])
    every = graph.layer if graph.layer is not None else ranks(len(graph.nodes), graph.source, graph.target)
    used = np.unique(np.concatenate([graph.source[kept], graph.target[kept]])) if len(kept) else np.arange(len(every))
    place = {int(node): i for i, node in enumerate(used)}
    ends = [(place[int(graph.source[e])], place[int(graph.target[e])]) for e in kept]
    height = np.asarray(every)[used]
    levels = np.unique(height)
    position = graph.node_columns.get("position")
    shared = {level: _shared([graph.nodes[i] for i in np.flatnonzero(every == level)], position) for level in levels}
    row_names = [shared[level].rstrip(ENDS) for level in levels]
    names = [_short(graph.nodes[i], shared[level]) for i, level in zip(used, height, strict=True)]
    if position is None:
        widths = np.array([max(len(each), 2) * drawing.CHARACTER_PIXELS + 10 for each in names])
        counts = np.array([[(height == level).sum(), widths[height == level].sum()] for level in levels])
        room = min(((WIDE - wide) / max(n - 1, 1) for n, wide in counts), default=0.0)
        layout = layered(height, ends, widths, _between(room, GAPS))
        return _Frame(kept, used, ends, names, row_names, layout, _between(TALL / max(len(levels), 1), RISES), [])
    tokens = _tokens(graph, position)
    listed = np.unique([*(tokens if len(tokens) <= COLUMNS else ()), *position[used]])
    pitch = _between((WIDE + 200) / max(len(listed), 1), PITCHES)
    layout = columned(height, np.searchsorted(listed, position[used]), pitch, DOT)
    columns = [((i + 0.5) * pitch, tokens.get(int(at), str(at))) for i, at in enumerate(listed)]
    rise = _between(TALL / max(len(levels), 1), DOT_RISES)
    return _Frame(kept, used, ends, names, row_names, layout, rise, columns)


def _sizes(graph: Graph) -> np.ndarray:
    return np.nan_to_num(np.abs(graph.weight.astype(np.float64)), nan=0.0, posinf=np.finfo(np.float64).max)


def _tokens(graph: Graph, position: np.ndarray) -> dict[int, str]:
    """The token at every position: of the whole prompt, where the graph is about one, or of its nodes."""
    whole = graph.about.get("tokens")
    pairs = enumerate(whole) if whole else zip(position, graph.node_columns.get("token", position), strict=True)
    return {int(at): drawing.shown(token) for at, token in pairs}


def _between(value: float, span: tuple[float, float]) -> float:
    return round(min(max(value, span[0]), span[1]), 1)


def _shared(names: Sequence[str], position: Any) -> str:
    """What the names of a row begin with, up to a place where a name may be cut; nothing when there is one name alone,
    unless columns tell the rest."""
    if len(names) == 1 and position is None:
        return ""
    first, last = min(names), max(names)  # what these two share, all between them share
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[: max(first.rfind(each, 0, same) for each in ENDS) + 1]


def _short(name: str, shared: str) -> str:
    """A name without what its row says, brackets closed with it."""
    rest = name[len(shared) :]
    return drawing.shown(rest[:-1] if shared.endswith("[") and rest.endswith("]") else rest, 22)


def _ties(graph: Graph, frame: _Frame) -> list[dict[str, Any]]:
    """Lines from keys or values that several heads share to the heads that use them."""
    place = {graph.nodes[node]: i for i, node in enumerate(frame.used)}
    groups = zip(graph.about.get("heads", ()), graph.about.get("kv_heads", ()), strict=True)
    pairs = [
        (f"L{i}.attn.{side}[{h * shared // heads}]", f"L{i}.attn.z[{h}]")
        for i, (heads, shared) in enumerate(groups)
        for side in ("k", "v")
        for h in range(heads)
    ]
    rows = []
    for pair in pairs:
        if all(each in place for each in pair):
            (x, y), (x2, y2) = (_at(frame, place[each]) for each in pair)
            rows.append({"part": "tie", "x": x, "y": y, "x2": x2, "y2": y2})
    return rows


def _at(frame: _Frame, node: int) -> tuple[float, float]:
    return round(float(frame.layout.x[node]), 1), round(float(frame.layout.row[node]) * frame.rise, 1)


def _edges(graph: Graph, frame: _Frame) -> list[dict[str, Any]]:
    """The control points of every edge, one row each."""
    size, words = _sizes(graph), _described(graph)
    largest = float(size[frame.kept].max(initial=0.0)) or 1.0
    strands = max(1, int(frame.layout.gap / 2 / STRAND) // 2 * 2 + 1)
    beside = (
        _beside(frame, size) if frame.columns else [(n * 2 % strands - strands // 2) * STRAND for n in range(len(size))]
    )
    rows: list[dict[str, Any]] = []
    for n, (e, ends) in enumerate(zip(frame.kept, frame.ends, strict=True)):
        weight = float(graph.weight[e])
        edge = {"part": "edge", "edge": n, "from": graph.nodes[graph.source[e]], "to": graph.nodes[graph.target[e]]}
        edge |= {"sign": "negative" if weight < 0 else "positive", "shown": drawing.digits(weight)}
        edge["strength"] = round(float(size[e] / largest), 4)
        edge |= {name: _word(each[e]) for name, each in words.items()}
        path = [(x, level * frame.rise) for x, level in frame.layout.path(*ends, beside[n])]
        rows += [{**edge, "step": s, "x": round(x, 1), "y": round(y, 1)} for s, (x, y) in enumerate(path)]
    return rows


def _beside(frame: _Frame, size: np.ndarray) -> list[float]:
    """How far each edge is moved to the side: of several between the same two nodes the strongest runs straight."""
    total, seen = Counter(frame.ends), Counter[tuple[int, int]]()
    found = [0.0] * len(frame.ends)
    for n in sorted(range(len(frame.ends)), key=lambda n: -size[frame.kept[n]]):
        ends = frame.ends[n]
        turn = (seen[ends] + 1) // 2 * (1 if seen[ends] % 2 else -1)
        found[n] = turn * min(2 * STRAND, frame.layout.gap / total[ends])
        seen[ends] += 1
    return found


def _described(graph: Graph) -> dict[str, Any]:
    """The columns of edges that are words or whole numbers."""
    return {
        name: each
        for name, each in graph.edge_columns.items()
        if each.dtype.kind == "i" or (each.dtype == object and each.any())
    }


def _word(value: Any) -> str:
    """A column's value in a tooltip; whole numbers below zero stand for none."""
    return "" if isinstance(value, int | np.integer) and value < 0 else str(value)


def _nodes(graph: Graph, frame: _Frame) -> list[dict[str, Any]]:
    rows = []
    tall = DOT if frame.columns else PLATE
    for i, (name, width) in enumerate(zip(frame.names, frame.layout.widths, strict=True)):
        x, y = _at(frame, i)
        row = {"part": "node", "node": name, "name": graph.nodes[frame.used[i]], "x": x, "y": y}
        row |= {"left": round(x - float(width) / 2, 1), "right": round(x + float(width) / 2, 1)}
        rows.append(row | {"low": round(y - tall / 2, 1), "high": round(y + tall / 2, 1)})
        if frame.columns:
            rows[-1]["token"] = frame.columns[int(x // (frame.layout.gap + DOT))][1]
    return rows


def _words(graph: Graph, frame: _Frame) -> list[dict[str, Any]]:
    """What is written beside nodes and edges: rows, columns, and which heads the strongest edges are."""
    every = max(1, math.ceil(drawing.LABEL_PIXELS / frame.rise))
    rows: list[dict[str, Any]] = [
        {"part": "row", "text": name, "x": round(-frame.margin - BESIDE, 1), "y": round(i * frame.rise, 1)}
        for i, name in enumerate(frame.row_names)
        if name and i % every == 0
    ]
    y = -PLATE / 2 - BESIDE / 2
    rows += [{"part": "column", "text": token, "x": round(x, 1), "y": y} for x, token in frame.columns]
    return rows + _heads(graph, frame)


def _heads(graph: Graph, frame: _Frame) -> list[dict[str, Any]]:
    """Which heads the strongest edges of a drawing in columns are, beside their lower end, where there is room."""
    if not frame.columns or "head" not in graph.edge_columns:
        return []
    size, head = _sizes(graph)[frame.kept], graph.edge_columns["head"][frame.kept]
    strongest = sorted(np.flatnonzero((head >= 0) & (size > FAINT * size.max())), key=lambda n: -size[n])
    together: dict[tuple[int, int], list[int]] = {}
    for n in strongest:
        together.setdefault(frame.ends[n], []).append(int(head[n]))
    rows: list[dict[str, Any]] = []
    for (a, b), numbers in together.items():
        (xa, ya), (xb, yb) = _at(frame, a), _at(frame, b)
        listed = ", ".join(map(str, numbers[:MOST])) + (" ..." if len(numbers) > MOST else "")
        text = f"head{'s' if len(numbers) > 1 else ''} {listed}"
        wide = len(text) * drawing.CHARACTER_PIXELS
        x = xa + (wide / 2 + DOT) * (1 if xb >= xa else -1)
        row = {"part": "head", "text": text, "x": round(x, 1), "y": round((ya + yb) / 2, 1)}
        if not any(abs(x - o["x"]) < wide and abs(row["y"] - o["y"]) < drawing.LABEL_PIXELS for o in rows):
            rows.append(row)
    return rows


def _layers(graph: Graph, frame: _Frame, parts: set[str]) -> list[drawing.Spec]:
    right, top = frame.layout.width + frame.margin, float(frame.layout.row.max(initial=0)) * frame.rise + PLATE / 2
    across, up = (
        {"scale": {"domain": [round(a, 1), round(b, 1)], "nice": False, "zero": False}, "axis": None}
        | {"type": "quantitative"}
        for a, b in ((frame.left, right), (-frame.below, top))
    )
    place = {"x": {"field": "x", **across}, "y": {"field": "y", **up}}
    box = {"x": {"field": "left", **across}, "x2": {"field": "right"}}
    box |= {"y": {"field": "low", **up}, "y2": {"field": "high"}}
    text = {"text": {"field": "text", "type": "nominal"}}

    def layer(part: str, mark: drawing.Spec, encoding: drawing.Spec) -> list[drawing.Spec]:
        where = [{"filter": f"datum.part === '{part}'"}]
        return [{"transform": where, "mark": mark, "encoding": encoding}] if part in parts else []

    ends = {**place, "x2": {"field": "x2"}, "y2": {"field": "y2"}}
    named = [{"field": each, "type": "nominal"} for each in ("name", *(["token"] if frame.columns else []))]
    plate = {"type": "rect", "style": "plate", "cornerRadius": DOT / 2 if frame.columns else 3}
    name: drawing.Spec = {"type": "text", "style": "on_low", "fontSize": 10, "baseline": "middle"}
    column = {"type": "text", "style": "on_low", "fontSize": 10, "baseline": "middle" if frame.turned else "top"}
    column |= {"angle": 270, "align": "right"} if frame.turned else {}
    return [
        *layer("tie", {"type": "rule", "style": "rule", "strokeDash": [2, 3]}, ends),
        *_lines(graph, place),
        *layer("node", plate, {**box, "tooltip": named}),
        *([] if frame.columns else layer("node", name, {**place, "text": {"field": "node", "type": "nominal"}})),
        *layer("row", {**name, "style": "faint", "align": "right"}, {**place, **text}),
        *layer("column", column, {**place, **text}),
        *layer("head", {**name, "style": "halo", "fontSize": 9}, {**place, **text}),
        *layer("head", {**name, "fontSize": 9}, {**place, **text}),
    ]


def _lines(graph: Graph, place: drawing.Spec) -> list[drawing.Spec]:
    """Edges as smooth lines: by kind where there are kinds, negative ones dashed; else by sign."""

    def by_strength(low: float, high: float) -> drawing.Spec:
        scale = {"domain": [0, 1], "range": [low, high]}
        return {"field": "strength", "type": "quantitative", "scale": scale, "legend": None}

    unit = drawing.named(graph.measure, graph.unit)
    tooltip = [{"field": each, "type": "nominal"} for each in ("from", "to", *_described(graph))]
    encoding = {
        **place,
        "order": {"field": "step", "type": "ordinal"},
        "detail": {"field": "edge", "type": "nominal"},
        "strokeWidth": by_strength(THINNEST, THICKEST),
        "opacity": by_strength(0.3, 0.9),
        "tooltip": [*tooltip, {"field": "shown", "type": "nominal", "title": unit}],
    }
    mark = {"type": "line", "interpolate": "basis", "strokeCap": "round"}
    kinds = _kinds(graph)
    if kinds:
        legend = {"title": None, "orient": "top", "symbolType": "stroke", "symbolStrokeWidth": 3, "symbolOpacity": 1}
        color = {"field": "kind", "type": "nominal", "scale": {"domain": kinds}, "legend": legend}
        dash = {"condition": {"test": "datum.sign === 'negative'", "value": [4, 3]}, "value": [1, 0]}
        where = [{"filter": "datum.part === 'edge'"}]
        return [{"transform": where, "mark": mark, "encoding": {**encoding, "color": color, "strokeDash": dash}}]
    return [
        {
            "transform": [{"filter": f"datum.part === 'edge' && datum.sign === '{sign}'"}],
            "mark": mark | {"style": sign},
            "encoding": encoding,
        }
        for sign in ("positive", "negative")
    ]


def _kinds(graph: Graph) -> list[str]:
    """What the edges are, in alphabetical order; none when all are alike."""
    column = graph.edge_columns.get("kind")
    found = sorted(set(column.tolist())) if column is not None and column.dtype == object else []
    return [str(each) for each in found] if len(found) > 1 else []


def _said(graph: Graph, frame: _Frame) -> list[str]:
    """How to read the lines, and which edges are left out."""
    if not len(frame.kept):
        return []
    unit = f" {graph.unit}" if graph.unit else ""
    thickest = graph.weight[frame.kept[int(_sizes(graph)[frame.kept].argmax())]]
    negative = bool((graph.weight[frame.kept] < 0).any())
    if _kinds(graph):
        colors = "; dashed where negative" if negative else ""
    else:
        colors = "; orange is positive, blue negative"
    said = f"width is the size of the {graph.measure}, {drawing.digits(float(thickest))}{unit} at the thickest{colors}"
    some = len(frame.kept) < len(graph.weight)
    return [said, f"the strongest {len(frame.kept)} of {len(graph.weight):,} edges" if some else ""]
