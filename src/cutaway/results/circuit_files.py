"""Circuit files of EAP-IG and MIB: JSON and ``.pt``, both ways.

They name nodes ``input``, ``a0.h1``, ``m0`` and ``logits``, edges ``a0.h1->a2.h3<q>``, and give every query head keys
and values of its own. Where heads share them, a group's score is written in equal parts to its heads, and read back as
the sum of theirs.

They hold every edge of the model, each marked as in the circuit or not. What is read is the circuit; all edges where
none is marked or every one is, since those files hold scores that nothing was chosen by yet.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from cutaway.core.errors import MismatchError, ResultError
from cutaway.ops.wiring import EMBED, LOGITS, Wiring
from cutaway.results.circuit import INSIDE, places, wiring_of
from cutaway.results.graph import Graph

NEEDED = ("cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph")
_EDGE = re.compile(r"(?P<source>[^<>]+)->(?P<target>[^<>]+?)(?:<(?P<into>[qkv])>)?")
_HEAD, _MLP = re.compile(r"a(\d+)\.h(\d+)"), re.compile(r"m(\d+)")
Edges = dict[tuple[str, str, str], tuple[float, bool]]
"""(source, target, into) in their names -> (score, whether it is in the circuit)."""


def circuit_json(graph: Graph) -> bytes:
    """The JSON that ``Graph.from_json`` of EAP-IG reads."""
    config, edges = _theirs(graph)
    heads, layers = config["n_heads"], config["n_layers"]
    used = {end for (a, b, _), (_, kept) in edges.items() if kept for end in (a, b)}
    names = ["input", *(f"a{i}.h{h}" for i in range(layers) for h in range(heads)), *(f"m{i}" for i in range(layers))]
    nodes = {name: {"in_graph": name in used} for name in names} | {"logits": {"in_graph": True}}
    listed = {
        f"{a}->{b}" + (f"<{into}>" if into else ""): {"score": score, "in_graph": kept}
        for (a, b, into), (score, kept) in edges.items()
    }
    return json.dumps({"cfg": config, "nodes": nodes, "edges": listed}).encode()


def circuit_pt(graph: Graph) -> bytes:
    """The ``.pt`` that ``Graph.from_pt`` of EAP-IG reads; it opens with ``weights_only=True``."""
    import torch

    config, edges = _theirs(graph)
    heads, layers = config["n_heads"], config["n_layers"]
    sources = ["input"]
    targets: list[str] = []
    for i in range(layers):
        sources += [*(f"a{i}.h{h}" for h in range(heads)), f"m{i}"]
        targets += [*(f"a{i}.h{h}<{side}>" for side in "qkv" for h in range(heads)), f"m{i}"]
    targets.append("logits")
    row, column = ({name: n for n, name in enumerate(names)} for names in (sources, targets))
    scores = torch.zeros(len(sources), len(targets))
    kept = torch.zeros(len(sources), len(targets), dtype=torch.bool)
    for (a, b, into), (score, inside) in edges.items():
        at = row[a], column[f"{b}<{into}>" if into else b]
        scores[at], kept[at] = score, inside
    nodes = [bool(kept[row[name]].any()) for name in sources]
    whole = {"cfg": config, "src_nodes": sources, "dst_nodes": targets, "edges_scores": scores, "edges_in_graph": kept}
    file = io.BytesIO()
    torch.save({**whole, "nodes_in_graph": torch.tensor(nodes)}, file)
    return file.getvalue()


def from_circuit_json(held: dict[str, Any], name: str, wiring: Wiring | None = None, whole: bool = False) -> Graph:
    """The circuit of a circuit JSON's content; ``wiring`` is that of the model it has to fit, ``whole`` all edges."""
    asked = f"circuit file {name!r}"
    edges: Edges = {}
    for text, about in held["edges"].items():
        match = _EDGE.fullmatch(text)
        if match is None or not isinstance(about, dict) or "score" not in about:
            raise ResultError(asked, f"edge {text!r} does not read as one with a score")
        key = (match["source"], match["target"], match["into"] or "")
        edges[key] = (float(about["score"]), bool(about.get("in_graph")))
    if any(isinstance(node, dict) and "neurons" in node for node in held.get("nodes", {}).values()):
        raise ResultError(asked, "it chooses neurons inside of nodes, which edges cannot say", "give one of edges")
    return _ours(held["cfg"], edges, name, wiring, whole)


def from_circuit_pt(path: Path, wiring: Wiring | None = None, whole: bool = False) -> Graph:
    """The circuit of a ``.pt`` file, or all of its edges; nothing in it is run."""
    import pickle

    import torch

    asked = f"circuit file {path.name!r}"
    try:
        held = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        why = (str(error).splitlines() or [""])[0][:80].rstrip(".")
        why = why if " " in why else "it is none that torch wrote"  # a bare number is what pickle says of other files
        found = f"it cannot be opened without running code ({why})"
        raise ResultError(asked, found, "give the JSON form") from None
    missing = [key for key in NEEDED if not isinstance(held, dict) or key not in held]
    if missing:
        raise ResultError(asked, f"it lacks {', '.join(missing)}", "give a file that EAP-IG or MIB wrote")
    if "neurons_in_graph" in held:
        raise ResultError(asked, "it chooses neurons inside of nodes, which edges cannot say", "give one of edges")
    scores, kept = held["edges_scores"].float(), held["edges_in_graph"].bool()
    if list(scores.shape) != [len(held["src_nodes"]), len(held["dst_nodes"])] or kept.shape != scores.shape:
        found = f"{len(held['src_nodes'])} sources and {len(held['dst_nodes'])} targets for scores {list(scores.shape)}"
        raise ResultError(asked, found)
    expected = _real(_wiring(held["cfg"], path.name))
    edges: Edges = {}
    for i, source in enumerate(held["src_nodes"]):
        for j, target in enumerate(held["dst_nodes"]):
            node, _, into = target.rstrip(">").partition("<")
            if (source, node, into) in expected:
                edges[source, node, into] = float(scores[i, j]), bool(kept[i, j])
    return _ours(held["cfg"], edges, path.name, wiring, whole)


def _theirs(graph: Graph) -> tuple[dict[str, Any], Edges]:
    """Configuration and all edges of the model, under their names."""
    wiring = wiring_of(graph)
    asked = f"graph {graph.title!r} as a circuit file"
    if len(set(wiring.heads)) != 1 or len(set(wiring.parallel)) != 1:
        raise ResultError(asked, f"its model has {wiring}", "the format knows equal layers only")
    heads = wiring.heads[0]
    config = {
        "n_layers": len(wiring.heads),
        "n_heads": heads,
        "parallel_attn_mlp": bool(wiring.parallel[0]),
        "d_model": int(graph.about.get("d_model", 0)),
    }
    held = np.zeros(len(wiring)), np.zeros(len(wiring), dtype=bool)
    at = places(graph, wiring)
    inside = graph.edge_columns.get(INSIDE)
    held[0][at], held[1][at] = graph.weight, True if inside is None else inside
    edges: Edges = {}
    for e, (s, r) in enumerate(zip(*wiring.edges, strict=True)):
        receiver = wiring.receivers[r]
        fed = receiver.feeds if receiver.into in ("k", "v") else (None,)
        for each in fed:
            node = receiver.node if each is None else wiring.senders[each]
            edges[_name(wiring.senders[s]), _name(node), receiver.into] = float(held[0][e] / len(fed)), bool(held[1][e])
    return config, edges


def _name(ours: str) -> str:
    if ours in (EMBED, LOGITS):
        return "input" if ours == EMBED else "logits"
    layer, _, kind = ours.partition(".")
    return f"m{layer[1:]}" if kind == "mlp.out" else f"a{layer[1:]}.h{kind[kind.index('[') + 1 : -1]}"


def _wiring(config: Any, name: str) -> Wiring:
    try:
        layers, heads = int(config["n_layers"]), int(config["n_heads"])
    except (KeyError, TypeError, ValueError):
        raise ResultError(f"circuit file {name!r}", "it does not say how many layers and heads its model has") from None
    return Wiring((heads,) * layers, (heads,) * layers, (bool(config.get("parallel_attn_mlp")),) * layers)


def _real(wiring: Wiring) -> set[tuple[str, str, str]]:
    """Every edge of a model without shared keys and values, under their names."""
    return {
        (_name(wiring.senders[s]), _name(wiring.receivers[r].node), wiring.receivers[r].into)
        for s, r in zip(*wiring.edges, strict=True)
    }


def _ours(config: Any, edges: Edges, name: str, wiring: Wiring | None, whole: bool) -> Graph:
    own, asked = _wiring(config, name), f"circuit file {name!r}"
    if wiring is not None and (own.heads, own.parallel) != (wiring.heads, wiring.parallel):
        raise MismatchError(asked, f"it is of a model with {own}", f"this one has {wiring}")
    real = _real(own)
    odd = next((key for key in edges if key not in real), None)
    if odd is not None:
        raise ResultError(asked, f"it names an edge {odd[0]}->{odd[1]}, which {own} do not have")
    unscored = next((key for key, (score, _) in edges.items() if not np.isfinite(score)), None)
    if unscored is not None:
        found = f"edge {unscored[0]}->{unscored[1]} has the score {edges[unscored][0]}"
        raise ResultError(asked, found, "give a finite score for every edge")
    fitted = wiring or own
    number = {}
    for e, (s, r) in enumerate(zip(*fitted.edges, strict=True)):
        receiver = fitted.receivers[r]
        fed = receiver.feeds if receiver.into in ("k", "v") else (None,)
        for each in fed:
            node = receiver.node if each is None else fitted.senders[each]
            number[_name(fitted.senders[s]), _name(node), receiver.into] = e
    scores, kept = np.zeros(len(fitted)), np.zeros(len(fitted), dtype=bool)
    there = np.zeros(len(fitted), dtype=bool)
    for key, (score, inside) in edges.items():
        e = number[key]
        scores[e] += score
        kept[e] |= inside
        there[e] = True
    said, chosen = f"{int(kept.sum())} of {int(there.sum())} edges are in its circuit", bool(kept.any())
    chosen = chosen and not whole and bool((there & ~kept).any())
    taken = kept if chosen else there
    source, target, into = (each[taken] for each in fitted.ends)
    columns = {"into": into, **({INSIDE: kept[there]} if whole else {})}
    return Graph(
        title=f"Circuit file {name}",
        nodes=fitted.nodes,
        source=source,
        target=target,
        weight=scores[taken],
        layer=fitted.heights,
        edge_columns=columns,
        measure="score",
        about={**fitted.sizes, "d_model": int(config.get("d_model") or 0)},
        notes=(f"read from {name}: {said}; {'those' if chosen else 'all'} are read",),
    )
