"""Read a layer's plan off its recorded graph.

An addend of the trunk that depends on an attention call is attention's, and so is what mixes positions in its place or
beside it: a convolution, linear attention, a state space. The others are the MLP's. The matrices that write neurons and
heads are the linear modules behind those addends. Whatever does not fit is refused with the reason, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from cutaway.core.site import KINDS
from cutaway.models.graph import Addend, LayerGraph
from cutaway.models.intakes import experts_intake, mlp_intakes, value_intake
from cutaway.models.plan import Attention, Intake, Layer, Step, Tap
from cutaway.models.recorder import AttentionCall, Node

RESIDUAL = ("resid_pre", "attn.out", "resid_mid", "mlp.out", "resid_post")


def read_layer(graph: LayerGraph) -> Layer:
    """The plan of one layer from its recorded graph."""
    read: dict[str, Tap] = {}
    write: dict[str, Tap] = {}
    refused: dict[str, str] = {}
    norms: dict[str, str] = {}
    path = graph.frame.path
    name = type(graph.root.get_submodule(path)).__name__
    read["resid_pre"] = write["resid_pre"] = Tap("in", path, graph.start_slot, clone=graph.start.overwritten)
    read["resid_post"] = write["resid_post"] = Tap("out", path, graph.end_slot, clone=graph.end.overwritten)
    calls = graph.attention_calls()
    attention = graph.describe(calls) if calls else f"{name} has no attention that ends in a softmax over keys"
    addends = graph.trunk()
    parts = _parts(graph, addends, calls) if addends else []
    attn = [p for p in parts if p[0] == "attn"]
    mlp = [p for p in parts if p[0] == "mlp"]
    if not addends:
        why = f"{name} does not add its parts to the residual stream one after the other"
        refused |= dict.fromkeys(("attn.out", "mlp.out", "resid_mid"), why)
    for kind, found in (("attn", attn), ("mlp", mlp)):
        if not addends:
            continue
        if len(found) != 1:
            refused[f"{kind}.out"] = (
                f"{name} adds {len(found)} {'attention' if kind == 'attn' else 'MLP'} terms to the residual stream"
            )
        else:
            _set(read, write, f"{kind}.out", graph.read_tap(found[0][1]), graph.write_tap(found[0][1]))
            if found[0][2].norm:
                norms[kind] = found[0][2].norm
    parallel = len(parts) == 2 and (attn[:1] > mlp[:1] or _parallel(graph, parts))
    if len(parts) == 2 and not parallel and len(attn) == 1:
        state = attn[0][2].state
        _set(read, write, "resid_mid", graph.read_tap(state), graph.write_tap(state))
    elif addends:
        why = "runs attention and MLP side by side" if parallel else f"has {len(parts)} terms, not attention then MLP"
        refused["resid_mid"] = f"{name} {why}"
    w_out, d_mlp = "", 0
    experts = graph.experts()
    if len(mlp) == 1:
        w_out, d_mlp = _mlp_inside(graph, mlp[0][1], read, write)
    for kind in ("mlp.in", "mlp.act"):
        if kind not in read:
            why = "is a mixture of experts: read expert.act" if experts else "has no single output matrix in its MLP"
            refused[kind] = f"{name} {why}"
    if isinstance(attention, str):
        refused |= dict.fromkeys((f"attn.{k}" for k in ("q", "k", "v", "scores", "pattern", "z")), attention)
    intakes, activation, no_intake = _intakes(graph, calls, attention, w_out, experts)
    expert_module = graph.root.get_submodule(experts) if experts else None
    if not experts:
        refused |= dict.fromkeys(
            ("expert.gate", "expert.act"), f"{name} has no experts that transformers' interface serves"
        )
    refused["sae"] = "no dictionary is attached"
    rank = graph.start.tensor.ndim
    if rank > 3 or (rank == 3 and graph.start.shape[0] != graph.batch):  # XLNet has positions first
        why = f"{name} carries a residual stream of shape {list(graph.start.shape)}, not [batch, pos, d_model]"
        for kind in RESIDUAL:
            read.pop(kind, None), write.pop(kind, None)
            refused[kind] = why
    for kind in ("attn.out", "mlp.out", "resid_mid"):
        if kind not in read and kind not in refused:
            refused[kind] = f"{name} makes it where no module and no torch call can be tapped"
    w_o = graph.head_writer(calls[0].z) if calls and not isinstance(attention, str) else ""
    return Layer(
        path=path,
        read=read,
        write=write,
        attention=None if isinstance(attention, str) else attention,
        experts=experts,
        w_out=w_out,
        w_o=w_o,
        gated=bool(w_o) and graph.gated(w_o),
        norms=norms,
        behind={kind: norm for kind, found in (("attn", attn), ("mlp", mlp)) if (norm := _behind(graph, found))},
        parallel=parallel,
        d_model=graph.start.shape[-1],
        d_mlp=d_mlp,
        n_experts=int(expert_module.down_proj.shape[0]) if expert_module is not None else 0,  # type: ignore[index]
        d_expert=_d_expert(expert_module),
        refused=refused,
        intakes=intakes,
        activation=activation,
        no_intake=no_intake,
        terms=len(parts),
    )


def refused_layer(path: str, why: str) -> Layer:
    """The plan of a layer that is not understood as a whole: everything is refused."""
    kinds = [kind for kind, about in KINDS.items() if about.layered]
    return Layer(path, {}, {}, None, "", "", "", {}, False, 0, 0, 0, 0, dict.fromkeys(kinds, f"{path}: {why}"))


def _behind(graph: LayerGraph, parts: list[tuple[str, Node, Addend]]) -> str:
    return graph.norm_behind(parts[0][1]) if len(parts) == 1 else ""


def _d_expert(module: nn.Module | None) -> int:
    if module is None:
        return 0
    shape = module.down_proj.shape
    return int(shape[1] if module.is_transposed else shape[2])  # type: ignore[index]


def _set(read: dict[str, Tap], write: dict[str, Tap], kind: str, reader: Tap | None, writer: Tap | None) -> None:
    if reader is not None and writer is not None:
        read[kind], write[kind] = reader, writer


def _intakes(
    graph: LayerGraph, calls: list[AttentionCall], attention: Attention | str, w_out: str, experts: str
) -> tuple[dict[str, Intake], tuple[Step, ...], dict[str, str]]:
    """How the layer takes the stream in, and why not where that is not told."""
    intakes: dict[str, Intake] = {}
    activation: tuple[Step, ...] = ()
    why: dict[str, str] = {}
    value = attention if isinstance(attention, str) else value_intake(graph, calls, attention.kv_heads)
    if isinstance(value, str):
        why["v"] = value
    else:
        intakes["v"] = value
    if experts:
        intakes["experts"] = experts_intake(graph, experts)
    mlp = mlp_intakes(graph, graph.frames[w_out].inputs[0][1]) if w_out else "it has no single output matrix"
    if isinstance(mlp, str):
        why["mlp"] = mlp
    else:
        intakes |= mlp[0]
        activation = mlp[1]
    return intakes, activation, why


def _parts(graph: LayerGraph, addends: list[Addend], calls: list[AttentionCall]) -> list[tuple[str, Node, Addend]]:
    """Every term that is added to the trunk, as "attn" or "mlp"."""
    stops = {id(graph.start)} | {id(a.total) for a in addends} | {id(a.state) for a in addends}

    def split(attends: Callable[[Node], bool]) -> list[tuple[str, Node, Addend]]:
        return [
            ("attn" if attends(term) else "mlp", term, addend)
            for addend in addends
            for term in graph.terms(addend.node, attends)
        ]

    found = split(lambda term: graph.depends(term, calls, stops))
    if sum(kind == "mlp" for kind, _, _ in found) <= bool(calls):
        return found  # attention was seen, and there is one MLP at most
    return split(lambda term: graph.depends(term, calls, stops) or graph.mixes(term))


def _parallel(graph: LayerGraph, parts: list[tuple[str, Node, Addend]]) -> bool:
    """Whether no part of the layer reads the state between its two terms."""
    between = {id(parts[0][2].state), id(parts[0][2].total)}
    todo, seen = [parts[1][1]], {id(graph.start)}
    while todo:
        node = todo.pop()
        if id(node) in between:
            return False
        if id(node) not in seen:
            seen.add(id(node))
            todo.extend(node.inputs)
    return True


def _mlp_inside(graph: LayerGraph, out: Node, read: dict[str, Tap], write: dict[str, Tap]) -> tuple[str, int]:
    w_out = graph.writer(out)
    if not w_out:
        return "", 0
    slot, act = graph.frames[w_out].inputs[0]
    read["mlp.act"] = write["mlp.act"] = Tap("in", w_out, slot, clone=act.overwritten)
    tap = graph.mlp_input(act)
    if tap is not None:
        read["mlp.in"] = write["mlp.in"] = tap
    return w_out, act.shape[-1]
