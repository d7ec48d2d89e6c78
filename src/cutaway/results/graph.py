"""Graph: components of a model and the weighted edges between them: circuits, information flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cutaway.core.errors import ResultError
from cutaway.core.result import Array, columns_over, over
from cutaway.results import drawing
from cutaway.results.kind import Kind
from cutaway.results.layout import layered, ranks

if TYPE_CHECKING:
    import networkx
    import pandas

FOREIGN = (".circuit.json", ".attribution.json", ".pt")
"""Endings of files in the formats of others: see ``cutaway.results.graph_formats``."""
EDGES = 200  # more strokes than this hide each other
GAP, RISE, PLATE = 14.0, 58.0, 17.0
MARGIN = 2 * GAP  # edges may pass outside of all nodes
THINNEST, THICKEST = 0.5, 5.0
STRANDS = 5  # places across a gap that edges through it take in turn


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Graph(Kind, kind="graph"):
    """Directed edges between named ``nodes``, drawn in layers from the inputs below to the output above.

    Args:
        nodes: different names [node], site strings where they are places in the model.
        source, target: indices into ``nodes`` [edge]; two nodes may share several edges.
        weight: what each edge carries [edge], signed, in ``unit``; ``measure`` says what it is.
        layer: height of each node in the drawing [node]; by longest path from the inputs when absent.
        node_columns, edge_columns: more about each node or edge.
        about: what else its readers need: the sizes of the model that it is a graph of, the prompt.
    """

    nodes: Array = field(metadata=over("node"))
    source: Array = field(metadata=over("edge"))
    target: Array = field(metadata=over("edge"))
    weight: Array = field(metadata=over("edge"))
    layer: Array = field(default=None, metadata=over("node"))
    node_columns: dict[str, Array] = field(default_factory=dict, metadata=columns_over("node"))
    edge_columns: dict[str, Array] = field(default_factory=dict, metadata=columns_over("edge"))
    measure: str = "weight"
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("source", "target"):
            object.__setattr__(self, name, np.array(getattr(self, name), dtype=np.int64))
        super().__post_init__()
        if len(set(self.nodes)) != len(self.nodes):
            twice = next(each for each in self.nodes if list(self.nodes).count(each) > 1)
            raise ResultError("a graph", f"two nodes are called {twice!r}", "give every node its own name")
        ends = np.concatenate([self.source, self.target])
        if ends.size and (ends.min() < 0 or ends.max() >= len(self.nodes)):
            found = f"an edge ends at node {ends.max() if ends.max() >= len(self.nodes) else ends.min()}"
            raise ResultError("a graph", found, f"there are nodes 0 to {len(self.nodes) - 1}")

    def table(self) -> pandas.DataFrame:
        """One row per edge: source, target, weight and the edge columns."""
        import pandas

        ends = {"source": self.nodes[self.source], "target": self.nodes[self.target]}
        return pandas.DataFrame({**ends, "weight": self.weight, **self.edge_columns})

    def highlights(self) -> pandas.DataFrame:
        """Edges from the strongest to the weakest."""
        return self.table().sort_values("weight", key=abs, ascending=False, kind="stable")

    def to_networkx(self) -> networkx.MultiDiGraph:
        """The same graph for networkx: node and edge columns as attributes."""
        import networkx

        graph = networkx.MultiDiGraph(title=self.title, unit=self.unit, measure=self.measure, about=dict(self.about))
        for i, name in enumerate(self.nodes):
            height = {} if self.layer is None else {"layer": self.layer[i].item()}
            graph.add_node(name, **height, **{key: each[i] for key, each in self.node_columns.items()})
        for i, (a, b) in enumerate(zip(self.source, self.target, strict=True)):
            more = {key: each[i] for key, each in self.edge_columns.items()}
            graph.add_edge(self.nodes[a], self.nodes[b], weight=float(self.weight[i]), **more)
        return graph

    def write(self, path: str | Path, **options: Any) -> Path:
        """As every result; the endings ``.circuit.json``, ``.pt`` and ``.attribution.json`` are formats of others."""
        if Path(path).name.endswith(FOREIGN) and not options:
            from cutaway.results.graph_formats import write_foreign

            return write_foreign(self, Path(path))
        return super().write(path, **options)

    def spec(self, edges: int = EDGES) -> drawing.Spec:
        """The strongest ``edges`` edges and the nodes they join: width is size, colour is sign."""
        size = np.nan_to_num(np.abs(self.weight.astype(np.float64)), nan=0.0, posinf=np.finfo(np.float64).max)
        kept = np.sort(np.argsort(-size, kind="stable")[:edges])
        height = self.layer if self.layer is not None else ranks(len(self.nodes), self.source, self.target)
        used = (
            np.unique(np.concatenate([self.source[kept], self.target[kept]]))
            if len(kept)
            else np.arange(len(self.nodes))
        )
        names = [drawing.shown(self.nodes[i], 22) for i in used]
        widths = np.array([len(each) * drawing.CHARACTER_PIXELS + 10 for each in names])
        place = {int(node): i for i, node in enumerate(used)}
        links = [(place[int(self.source[e])], place[int(self.target[e])]) for e in kept]
        drawn = layered(np.asarray(height)[used], links, widths, GAP)
        largest = float(size[kept].max(initial=0.0)) or 1.0
        words = {name: each for name, each in self.edge_columns.items() if each.dtype == object and each.any()}
        rows: list[drawing.Spec] = []
        for a, b in self._ties():
            if a in place and b in place:
                ends = ((drawn.x[place[i]], drawn.row[place[i]] * RISE) for i in (a, b))
                x, y, x2, y2 = (round(float(each), 1) for end in ends for each in end)
                rows.append({"part": "tie", "x": x, "y": y, "x2": x2, "y2": y2})
        for n, (e, (a, b)) in enumerate(zip(kept, links, strict=True)):
            weight = float(self.weight[e])
            edge: drawing.Spec = {"part": "edge", "edge": n, "from": names[a], "to": names[b]}
            edge |= {"sign": "negative" if weight < 0 else "positive", "shown": drawing.digits(weight)}
            edge["strength"] = round(float(size[e] / largest), 4)
            edge |= {name: str(each[e]) for name, each in words.items()}
            beside = (n * 2 % STRANDS - STRANDS // 2) * GAP / (2 * STRANDS)
            path = [(x, level * RISE) for x, level in drawn.path(a, b, beside)]
            rows += [{**edge, "step": s, "x": round(x, 1), "y": round(y, 1)} for s, (x, y) in enumerate(path)]
        for name, x, level, width in zip(names, drawn.x, drawn.row, widths, strict=True):
            y = level * RISE
            node = {"part": "node", "node": name, "x": x, "y": y, "left": x - width / 2, "right": x + width / 2}
            node |= {"low": y - PLATE / 2, "high": y + PLATE / 2}
            rows.append({key: each if isinstance(each, str) else round(float(each), 1) for key, each in node.items()})
        return self._document(rows, drawn.width, float(drawn.row.max(initial=0)) * RISE + PLATE, len(kept), list(words))

    def _ties(self) -> list[tuple[int, int]]:
        """(keys or values that several heads share, a head that uses them), where the nodes are such."""
        at = {name: i for i, name in enumerate(self.nodes)}
        groups = zip(self.about.get("heads", ()), self.about.get("kv_heads", ()), strict=True)
        return [
            (at[f"L{i}.attn.{side}[{h * shared // heads}]"], at[f"L{i}.attn.z[{h}]"])
            for i, (heads, shared) in enumerate(groups)
            for side in ("k", "v")
            for h in range(heads)
            if f"L{i}.attn.{side}[{h * shared // heads}]" in at and f"L{i}.attn.z[{h}]" in at
        ]

    def _document(
        self, rows: list[dict[str, Any]], wide: float, tall: float, drawn: int, words: Sequence[str]
    ) -> drawing.Spec:
        across = {
            "scale": {"domain": [-MARGIN, wide + MARGIN], "nice": False, "zero": False},
            "axis": None,
            "type": "quantitative",
        }
        up = {
            "scale": {"domain": [-PLATE / 2, tall - PLATE / 2], "nice": False, "zero": False},
            "axis": None,
            "type": "quantitative",
        }
        x, y = {"field": "x", **across}, {"field": "y", **up}
        said = {"field": "shown", "type": "nominal", "title": drawing.named(self.measure, self.unit)}
        tooltip = [{"field": each, "type": "nominal"} for each in ("from", "to", *words)] + [said]
        width_scale = {"domain": [0, 1], "range": [THINNEST, THICKEST]}
        layers: list[drawing.Spec] = [
            {
                "transform": [{"filter": f"datum.part === 'edge' && datum.sign === '{sign}'"}],
                "mark": {"type": "line", "interpolate": "basis", "style": sign, "strokeCap": "round"},
                "encoding": {
                    "x": x,
                    "y": y,
                    "order": {"field": "step", "type": "ordinal"},
                    "detail": {"field": "edge", "type": "nominal"},
                    "strokeWidth": {"field": "strength", "type": "quantitative", "scale": width_scale, "legend": None},
                    "opacity": {
                        "field": "strength",
                        "type": "quantitative",
                        "scale": {"domain": [0, 1], "range": [0.25, 0.9]},
                        "legend": None,
                    },
                    "tooltip": tooltip,
                },
            }
            for sign in ("positive", "negative")
        ]
        if any(row["part"] == "tie" for row in rows):
            tie = {"type": "rule", "style": "rule", "strokeDash": [2, 3]}
            ends = {"x": x, "y": y, "x2": {"field": "x2"}, "y2": {"field": "y2"}}
            layers.insert(0, {"transform": [{"filter": "datum.part === 'tie'"}], "mark": tie, "encoding": ends})
        node = {"transform": [{"filter": "datum.part === 'node'"}]}
        layers.append(
            {
                **node,
                "mark": {"type": "rect", "style": "plate", "cornerRadius": 3},
                "encoding": {
                    "x": {"field": "left", **across},
                    "x2": {"field": "right"},
                    "y": {"field": "low", **up},
                    "y2": {"field": "high"},
                },
            }
        )
        layers.append(
            {
                **node,
                "mark": {"type": "text", "style": "on_low", "fontSize": 10, "baseline": "middle"},
                "encoding": {"x": x, "y": y, "text": {"field": "node", "type": "nominal"}},
            }
        )
        said_once = (
            f"width: size of {self.measure}{f' in {self.unit}' if self.unit else ''}; orange adds, blue takes away"
        )
        left_out = f"the strongest {drawn} of {len(self.weight):,} edges" if drawn < len(self.weight) else ""
        body = {"data": {"values": rows}, "width": wide + 2 * MARGIN, "height": tall, "layer": layers}
        return drawing.document(body, drawing.heading(self.title, *self.caption(), said_once, left_out))
