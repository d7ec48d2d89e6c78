"""Graph: components of a model and the weighted edges between them: circuits, information flow."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cutaway.core.errors import ResultError
from cutaway.core.result import Array, columns_over, over
from cutaway.results import drawing
from cutaway.results.kind import FOREIGN, Kind, no_options

if TYPE_CHECKING:
    import networkx
    import pandas

EDGES = 200  # more strokes than this hide each other


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
        if Path(path).name.endswith(FOREIGN):
            no_options(options, Path(path).suffix)
            from cutaway.results.graph_formats import write_foreign

            return write_foreign(self, Path(path))
        return super().write(path, **options)

    def spec(self, edges: int = EDGES) -> drawing.Spec:
        """The strongest ``edges`` edges and the nodes they join: width is size, colour is kind or sign.

        Nodes with a column ``position`` stand in the order of positions, under the column ``token``; others where edges
        cross little.
        """
        from cutaway.results.graph_drawing import picture

        return picture(self, edges)
