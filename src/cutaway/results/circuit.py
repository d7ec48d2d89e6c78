"""A circuit: some edges of a scored graph, chosen by their scores. A function of a result, since no model is needed."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from cutaway.core.errors import ParameterError, ResultError
from cutaway.ops.selection import By, greedy, pruned, ranked, strengths
from cutaway.ops.wiring import Wiring
from cutaway.results.graph import Graph

How = Literal["top", "threshold", "greedy"]
INSIDE = "in_graph"
"""Column of a graph that holds all scored edges of a circuit file: which of them are in the file's circuit."""


def wiring_of(graph: Graph) -> Wiring:
    """The wiring of the model that a graph's edges are of.

    Raises:
        ResultError: the graph does not say, or its nodes are others.
    """
    try:
        found = Wiring.from_sizes(graph.about)
    except (KeyError, TypeError):
        found_in = (
            f"it does not say how many heads the layers of its model have (it is about {dict(graph.about) or '?'})"
        )
        raise ResultError(f"the edges of graph {graph.title!r}", found_in, "give one that 'edges' made") from None
    if tuple(graph.nodes) != found.nodes:
        raise ResultError(f"the edges of graph {graph.title!r}", f"its nodes are not those of {found}")
    return found


def places(graph: Graph, wiring: Wiring) -> np.ndarray:
    """[edge] which edge of the wiring each edge of the graph is.

    Raises:
        ResultError: one of them is none.
    """
    into = graph.edge_columns.get("into")
    if into is None:
        raise ResultError(f"the edges of graph {graph.title!r}", "they do not say whether they enter as q, k or v")
    try:
        return wiring.numbers(graph.nodes[graph.source], graph.nodes[graph.target], into)
    except KeyError as error:
        raise ResultError(f"edge {error.args[0]} of graph {graph.title!r}", f"{wiring} have no such edge") from None


def circuit(
    graph: Graph,
    how: How = "top",
    n: int | None = None,
    threshold: float | None = None,
    by: By = "size",
    prune: bool = True,
) -> Graph:
    """The edges of ``graph`` that make a circuit, as a new graph with the same nodes.

    Args:
        how: "top": the n strongest. "threshold": all whose strength is at least that. "greedy": from the logits
            backwards, n times the strongest edge into what is there already.
        n: how many edges. threshold: the least strength.
        by: strength is the size of the score, or how much corrupting the edge lowers the metric ("support").
        prune: drop edges that lie on no path from the embedding to the logits; there may be fewer than n then.

    Raises:
        ParameterError: ``n`` or ``threshold`` is missing, or not asked for. ResultError: the graph has no edges between
        components, or no path is left.
    """
    if (threshold is not None) != (how == "threshold") or (n is not None) == (how == "threshold"):
        found = f"n is {n}, threshold is {threshold}"
        raise ParameterError(f"a circuit by {how!r}", found, "top and greedy take n, threshold takes a threshold")
    if n is not None and n < 1:
        raise ParameterError("a circuit", f"n is {n}", "keep at least one edge")
    wiring = wiring_of(graph)
    chosen = choose(wiring, places(graph, wiring), graph.weight, how, n, threshold, by)
    kept = pruned(wiring, chosen) if prune else chosen
    words = {"top": f"the {n} strongest", "greedy": f"{n} chosen from the logits backwards"}.get(
        how, f"those of strength {threshold:g} or more" if threshold is not None else ""
    )
    if not len(kept):
        few = f"{len(chosen)} edges, none on a path" if len(chosen) else "no edge"
        raise ResultError(
            f"a circuit of {words}", f"{few} from the embedding to the logits", "take more, or how='greedy'"
        )
    number = {int(e): i for i, e in enumerate(places(graph, wiring))}
    at = np.array(sorted(number[int(e)] for e in kept))
    said = f"{len(at)} of {len(graph.weight):,} edges: {words} by {by}{', without dead ends' if prune else ''}"
    origin = f"chosen from the result of {graph.made_by.method} on {graph.made_by.model}" if graph.made_by else ""
    return graph.replace(
        title=f"Circuit of {len(at)} edges" + (f" in {graph.about['model']}" if "model" in graph.about else ""),
        source=graph.source[at],
        target=graph.target[at],
        weight=graph.weight[at],
        edge_columns={name: each[at] for name, each in graph.edge_columns.items() if name != INSIDE},
        made_by=None,
        check=None,
        proof=None,
        notes=tuple(note for note in (said, origin) if note),
    )


def choose(
    wiring: Wiring,
    edges: np.ndarray,
    weights: Any,
    how: How,
    n: int | None = None,
    threshold: float | None = None,
    by: By = "size",
) -> np.ndarray:
    """Numbers of the edges of the wiring that are chosen, the strongest first; only those given can be."""
    strength = np.full(len(wiring), np.nan)
    strength[edges] = strengths(np.asarray(weights, dtype=np.float64), by)
    if how == "greedy":
        return greedy(wiring, strength, n or 0)
    order = ranked(strength)
    return order[:n] if threshold is None else order[strength[order] >= threshold]
