"""Choosing edges: strongest, above a threshold, from the logits backwards; dead ends dropped; nothing in place."""

from __future__ import annotations

import numpy as np
import pytest

from cutaway.core.errors import ParameterError, ResultError
from cutaway.ops.selection import EdgeDraws, pruned
from cutaway.ops.wiring import Wiring
from cutaway.results import Graph
from cutaway.results.circuit import circuit

ONE_HEAD = Wiring(heads=(1, 1), kv_heads=(1, 1), parallel=(False, False))
PATH = [("embed", "L0.attn.z[0]", "v"), ("L0.attn.z[0]", "L1.attn.z[0]", "k"), ("L1.attn.z[0]", "logits", "")]


def scored(weights: dict[tuple[str, str, str], float], wiring: Wiring = ONE_HEAD) -> Graph:
    source, target, into = wiring.ends
    keys = [(wiring.nodes[a], wiring.nodes[b], c) for a, b, c in zip(source, target, into, strict=True)]
    return Graph(
        title="scored",
        nodes=wiring.nodes,
        source=source,
        target=target,
        weight=[weights.get(key, 0.0) for key in keys],
        edge_columns={"into": into},
        about=wiring.sizes,
    )


def kept(graph: Graph) -> set[tuple[str, str, str]]:
    table = graph.table()
    return set(zip(table.source, table.target, table.into, strict=True))


def test_the_wiring_counts_edges_as_the_published_code_does() -> None:
    gpt2_small = Wiring((12,) * 12, (12,) * 12, (False,) * 12)
    assert len(gpt2_small) == 32_491
    assert len(gpt2_small.senders) == 157
    grouped = Wiring((4,), (2,), (True,))
    assert [r.node for r in grouped.receivers][4:] == [
        *(f"L0.attn.{s}[{g}]" for s in "kv" for g in (0, 1)),
        "L0.mlp.out",
        "logits",
    ]
    assert grouped.receivers[8].reads == 1  # a parallel MLP does not read its layer's heads


def test_the_strongest_edges_without_dead_ends() -> None:
    dead = ("L0.mlp.out", "L1.attn.z[0]", "q")  # nothing is said to reach the MLP
    graph = scored({**dict.fromkeys(PATH, 1.0), dead: -5.0})
    assert kept(circuit(graph, n=4)) == set(PATH)
    assert kept(circuit(graph, n=4, prune=False)) == {*PATH, dead}
    assert len(graph.weight) == len(ONE_HEAD)  # the graph that was given is what it was
    assert circuit(graph, n=4).nodes.tolist() == graph.nodes.tolist()


def test_a_threshold_and_the_sign() -> None:
    graph = scored({PATH[0]: -3.0, PATH[1]: -2.0, PATH[2]: -1.0, ("embed", "logits", ""): 4.0})
    assert kept(circuit(graph, how="threshold", threshold=1.0)) == {*PATH, ("embed", "logits", "")}
    assert kept(circuit(graph, n=3, by="support")) == set(PATH)
    assert kept(circuit(graph, n=1)) == {("embed", "logits", "")}


def test_greedy_grows_from_the_logits_backwards() -> None:
    far = {("embed", "L0.attn.z[0]", "q"): 9.0, ("L0.attn.z[0]", "L0.mlp.out", ""): 8.0}
    graph = scored({**far, **dict(zip(PATH, (1.0, 2.0, 3.0), strict=True))})
    assert kept(circuit(graph, how="greedy", n=4)) == {*PATH[1:], ("embed", "L0.attn.z[0]", "q"), PATH[0]}
    with pytest.raises(ResultError, match="2 edges, none on a path from the embedding to the logits; take more"):
        circuit(graph, n=2)


def test_shared_keys_lead_to_the_heads_that_use_them() -> None:
    wiring = Wiring((2,), (1,), (False,))
    graph = scored({("embed", "L0.attn.k[0]", "k"): 2.0, ("L0.attn.z[1]", "logits", ""): 1.0}, wiring)
    assert kept(circuit(graph, n=2)) == {("embed", "L0.attn.k[0]", "k"), ("L0.attn.z[1]", "logits", "")}


def test_what_makes_no_circuit_is_refused_in_one_sentence() -> None:
    graph = scored(dict.fromkeys(PATH, 1.0))
    with pytest.raises(ParameterError, match="threshold takes a threshold"):
        circuit(graph, how="threshold", n=3)
    with pytest.raises(ParameterError, match="n is None"):
        circuit(graph)
    with pytest.raises(ParameterError, match="keep at least one edge"):
        circuit(graph, n=0)
    with pytest.raises(ResultError, match="no edge from the embedding to the logits"):
        circuit(graph, how="threshold", threshold=7.0)
    with pytest.raises(ResultError, match="does not say how many heads"):
        circuit(graph.replace(about={}), n=3)
    with pytest.raises(ResultError, match="its nodes are not those of 1 layers"):
        circuit(graph.replace(about=Wiring((1,), (1,), (False,)).sizes), n=3)


def test_random_edges_have_the_profile_of_those_they_stand_for() -> None:
    wiring = Wiring((4, 4), (4, 4), (False, False))
    drawer = EdgeDraws(wiring, 0)
    given = np.arange(0, len(wiring), 5)
    drawn = drawer.draw(given, others=False)
    assert sorted(drawer.profile[e] for e in drawn) == sorted(drawer.profile[e] for e in given)
    assert len(set(drawn.tolist())) == len(given)
    others = drawer.draw(given, others=True)
    assert not set(others.tolist()) & set(given.tolist())
    assert len(others) == len(given)


def test_pruning_takes_nothing_from_a_whole_graph() -> None:
    every = np.arange(len(ONE_HEAD))
    assert pruned(ONE_HEAD, every).tolist() == every.tolist()
