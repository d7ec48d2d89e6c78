"""Graphs in the files of others: circuit files, attribution graphs for the viewers, networkx.

============================  =====================================================  ===========================
ending                        what it is                                             read back as
============================  =====================================================  ===========================
``.circuit.json``             EAP-IG's and MIB's circuits                            edges and scores
``.pt``                       the same as tensors                                    the same
``.attribution.json``         what the viewers of circuit-tracer and Neuronpedia     the nodes and links as they are
                              read
============================  =====================================================  ===========================
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from cutaway.core.errors import CutawayError, ResultError
from cutaway.ops.wiring import EMBED, LOGITS, Wiring
from cutaway.results.circuit_files import circuit_json, circuit_pt, from_circuit_json, from_circuit_pt
from cutaway.results.graph import Graph
from cutaway.results.kind import FOREIGN
from cutaway.results.layout import ranks

PARTS = ("metadata", "qParams", "nodes", "links")
FIELDS = ("node_id", "feature", "layer", "ctx_idx", "feature_type")


def write_foreign(graph: Graph, path: Path) -> Path:
    """One file in the format of its ending, see ``FOREIGN``; returns the path."""
    ending = next(each for each in FOREIGN if path.name.endswith(each))
    writers = {".circuit.json": circuit_json, ".pt": circuit_pt, ".attribution.json": attribution_json}
    data = writers[ending](graph)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise ResultError(f"writing {str(path)!r}", f"the disk refused ({error.strerror or error})") from error
    return path


def read_graph(path: str | Path, wiring: Wiring | None = None, whole: bool = False) -> Graph:
    """The graph of a circuit file (JSON or ``.pt``) or of an attribution graph's JSON, told by its content.

    Args:
        wiring: of the model that a circuit file has to fit; by default it is taken as it is.
        whole: all edges that a circuit file scores, and ``in_graph`` as a column, instead of its circuit alone.

    Raises:
        ResultError: no such file, or none of these formats. MismatchError: a circuit of another model.
    """
    path = Path(path)
    asked = f"reading a graph from {str(path)!r}"
    if not path.is_file():
        raise ResultError(asked, "there is no such file")
    try:
        return _read(path, asked, wiring, whole)
    except CutawayError:
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        found = f"a part of it is not what the format has there ({type(error).__name__}: {error})"
        raise ResultError(asked, found, "write it again") from None


def _read(path: Path, asked: str, wiring: Wiring | None, whole: bool) -> Graph:
    if path.suffix == ".pt":
        return from_circuit_pt(path, wiring, whole)
    try:
        held = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(asked, f"it is not JSON ({error})", "give .circuit.json, .attribution.json or .pt") from None
    if isinstance(held, dict) and all(key in held for key in ("cfg", "edges")):
        return from_circuit_json(held, path.name, wiring, whole)
    if isinstance(held, dict) and all(key in held for key in PARTS):
        return from_attribution(held, path.name)
    keys = f"it holds {', '.join(map(str, held))[:80]}" if isinstance(held, dict) else "it is no JSON object"
    raise ResultError(asked, keys, f"a circuit has cfg and edges, an attribution graph {', '.join(PARTS)}")


def is_foreign(path: Path) -> bool:
    """Whether a file is not one of our own results."""
    if path.suffix == ".pt" or not path.is_file():
        return path.suffix == ".pt"
    try:
        return b'"cutaway_result"' not in path.read_bytes()[:200]
    except OSError:
        return False


# -- attribution graphs ------------------------------------------------------------------------------------------------
def attribution_json(graph: Graph) -> bytes:
    """The JSON of an attribution graph: metadata, qParams, nodes, links.

    Nodes get ids ``layer_number_position``, with numbers that are used once in a layer, so that none collide; our name
    is the node's ``clerp``. Edges between the same two nodes stay apart and say what they enter as.
    """
    tokens = [str(each) for each in graph.about.get("tokens", ())] or ["", ""]
    tokens = tokens if len(tokens) > 1 else ["", *tokens]  # the viewer drops nodes of one-token prompts
    nodes, ids = _nodes(graph, len(tokens) - 1)
    links: list[dict[str, Any]] = []
    for i, (a, b) in enumerate(zip(graph.source, graph.target, strict=True)):
        more = {name: _plain(each[i]) for name, each in graph.edge_columns.items()}
        weight = float(graph.weight[i])
        links.append({"source": ids[a], "target": ids[b], "weight": weight if np.isfinite(weight) else 0.0, **more})
    metadata = {
        "slug": re.sub(r"[^a-z0-9]+", "-", graph.title.lower()).strip("-") or "graph",
        "scan": str(graph.about.get("model", "")),
        "transcoder_list": [],
        "prompt_tokens": tokens,
        "prompt": "".join(tokens),
        "node_threshold": None,
        "schema_version": 1,
        "cutaway": {"title": graph.title, "measure": graph.measure, "unit": graph.unit, "about": graph.about},
    }
    view = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return json.dumps({"metadata": metadata, "qParams": view, "nodes": nodes, "links": links}, allow_nan=False).encode()


def _nodes(graph: Graph, position: int) -> tuple[list[dict[str, Any]], list[str]]:
    height = ranks(len(graph.nodes), graph.source, graph.target) if graph.layer is None else graph.layer
    used: Counter[str] = Counter()
    layered = [int(m[1]) for name in graph.nodes if (m := re.match(r"L(\d+)\.", name))]
    top = max(layered, default=int(np.max(height, initial=0)))
    nodes, ids = [], []
    for name, level in zip(graph.nodes, height, strict=True):
        match = re.match(r"L(\d+)\.(attn|mlp)", name)
        kind = {"attn": "attention head", "mlp": "mlp"}[match[2]] if match else "component"
        layer = match[1] if match else str(int(level))
        clerp = str(name)
        if name == EMBED:
            layer, kind = "E", "embedding"
        elif name == LOGITS:
            layer, kind, clerp = str(top + 2), "logit", f'Output "{name}" (p=0)'  # the viewer reads a probability
        number = used[layer]
        used[layer] += 1
        ids.append(f"{layer}_{number}_{position}")
        node = {"node_id": ids[-1], "feature": number, "layer": layer, "ctx_idx": position, "feature_type": kind}
        node |= {"token_prob": 0.0, "is_target_logit": name == LOGITS, "run_idx": 0, "reverse_ctx_idx": 0}
        node |= {"jsNodeId": f"{layer}_{number}-0", "clerp": clerp, "influence": None, "activation": None}
        nodes.append(node | {"name": str(name)})
    return nodes, ids


def from_attribution(held: dict[str, Any], name: str) -> Graph:
    """The graph of an attribution graph's content; nodes are called by their ids, ours by their names.

    Raises:
        ResultError: a node lacks a field, two nodes have one id, or a link ends at no node.
    """
    asked = f"attribution graph {name!r}"
    nodes, links = held["nodes"], held["links"]
    for node in nodes:
        missing = [field for field in FIELDS if field not in node]
        if missing:
            raise ResultError(asked, f"node {node.get('node_id', '?')!r} has no {', '.join(missing)}")
    ids = [str(node["node_id"]) for node in nodes]
    twice = next((each for each, count in Counter(ids).items() if count > 1), None)
    if twice is not None:
        found = f"{ids.count(twice)} nodes have the id {twice!r}, so its links could belong to either"
        raise ResultError(asked, found, "write it again with ids that differ")
    at = {each: i for i, each in enumerate(ids)}
    lost = next((end for link in links for end in (link["source"], link["target"]) if end not in at), None)
    if lost is not None:
        raise ResultError(asked, f"a link ends at {lost!r}, which is no node")
    own = held["metadata"].get("cutaway", {})
    weight = np.array([float(link["weight"]) for link in links])
    extra = sorted(set.intersection(*(set(link) for link in links)) - {"source", "target", "weight"}) if links else []
    columns = {key: each for key in extra if (each := _column([link[key] for link in links])) is not None}
    fields = ("feature", "ctx_idx", "feature_type", "clerp", "influence", "activation")
    details = {f: each for f in fields if (each := _column([node.get(f) for node in nodes])) is not None}
    return Graph(
        title=own.get("title") or str(held["metadata"].get("slug") or name),
        nodes=[str(node.get("name", each)) for node, each in zip(nodes, ids, strict=True)],
        source=[at[link["source"]] for link in links],
        target=[at[link["target"]] for link in links],
        weight=weight,
        layer=[_height(str(node["layer"])) for node in nodes],
        node_columns=details,
        edge_columns=columns,
        measure=own.get("measure", "weight"),
        unit=own.get("unit", ""),
        about=own.get("about")
        or {
            "model": str(held["metadata"].get("scan") or ""),
            "tokens": [str(t) for t in held["metadata"].get("prompt_tokens") or ()],
        },
    )


def _height(layer: str) -> int:
    return 0 if layer == "E" else int(layer) + 1


def _column(values: list[Any]) -> list[Any] | None:
    """Values that make one column: all text, all truth values, or all numbers; None when they do not."""
    kinds = {type(each) for each in values}
    if kinds <= {int, float, type(None)} and kinds - {type(None)}:
        return [float("nan") if each is None else each for each in values]
    return values if len(kinds) == 1 and kinds <= {str, bool} else None


def _plain(value: Any) -> Any:
    plain = value.item() if hasattr(value, "item") else value
    return None if isinstance(plain, float) and not np.isfinite(plain) else plain


# -- networkx ----------------------------------------------------------------------------------------------------------
def from_networkx(graph: Any, measure: str = "weight", unit: str = "") -> Graph:
    """The graph of a networkx one: its nodes in their order, ``weight`` of its edges (1 where there is none).

    Attributes that all nodes (or all edges) have become columns where they are all numbers, all text or all truth
    values; what ``Graph.to_networkx`` wrote is read back whole.

    Raises:
        ResultError: an undirected graph, or two nodes of one name.
    """
    if not hasattr(graph, "is_directed") or not graph.is_directed():
        raise ResultError(f"a graph of networkx ({type(graph).__name__})", "it has no directions", "give a DiGraph")
    names = [str(each) for each in graph.nodes]
    at = {each: i for i, each in enumerate(graph.nodes)}
    edges = [(at[a], at[b], data) for a, b, data in graph.edges(data=True)]
    node_data = [dict(data) for _, data in graph.nodes(data=True)]
    layer = _column([data.pop("layer", None) for data in node_data]) if node_data else None
    edge_data = [{key: each for key, each in data.items() if key != "weight"} for *_, data in edges]
    return Graph(
        title=str(graph.graph.get("title", graph.graph.get("name", ""))),
        nodes=names,
        source=[a for a, _, _ in edges],
        target=[b for _, b, _ in edges],
        weight=np.array([float(data.get("weight", 1.0)) for *_, data in edges]),
        layer=None if layer is None or any(isinstance(each, str) or each != each for each in layer) else layer,
        node_columns=_shared(node_data),
        edge_columns=_shared(edge_data),
        measure=str(graph.graph.get("measure", measure)),
        unit=str(graph.graph.get("unit", unit)),
        about=dict(graph.graph.get("about", {})),
    )


def _shared(records: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The attributes that all have, as columns."""
    keys = set.intersection(*(set(each) for each in records)) if records else set()
    plain = {key: [_plain(each[key]) for each in records] for key in sorted(map(str, keys)) if key in records[0]}
    return {key: column for key, values in plain.items() if (column := _column(values)) is not None}
