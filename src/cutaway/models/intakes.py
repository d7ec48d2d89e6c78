"""Read off a layer's recorded graph how it takes the residual stream in: the matrices behind its values and its MLP.

Which outputs of a fused matrix are meant is found by sending their numbers through the same views, slices and
transposes that its output went through. Nothing is read off a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cutaway.models.graph import CUT, MOVE, MUL, SAME, LayerGraph
from cutaway.models.plan import Intake, Step
from cutaway.models.recorder import AttentionCall, Node, tensors

CASTS = {"to", "type", "float", "half", "bfloat16", "type_as", "dropout", "dropout_", "alpha_dropout", "detach"}
COPIES = MOVE | CUT | {"repeat", "cat"}  # of a cat only where its other operands are empty, such as a fresh cache
NO_MATRIX = "its {} are not the output of one matrix, cut into pieces at most"


def value_intake(graph: LayerGraph, calls: list[AttentionCall], kv_heads: int) -> Intake | str:
    """The matrix that makes the values of a layer's attention, or why there is none."""
    if len({call.module for call in calls}) != len(calls):
        return "it attends in several chunks"
    found = _source(graph, calls[0].v)
    if found is None:
        return NO_MATRIX.format("values")
    path, places = found
    places = places.unflatten(0, (graph.batch, -1)) if places.ndim == 3 else places  # batch and heads in one axis
    if places.ndim != 4 or places.shape[1] != kv_heads:
        return NO_MATRIX.format("values")
    return _intake(graph, path, places[0, :, 0].flatten(), places.transpose(1, 2).flatten(2))


def experts_intake(graph: LayerGraph, path: str) -> Intake:
    """What a layer's experts take in; their matrices lie in the module itself."""
    taken = next(n for _, n in graph.frames[path].inputs if n.tensor.is_floating_point())
    return Intake(path, None, _norm(graph, taken))


def mlp_intakes(graph: LayerGraph, act: Node) -> tuple[dict[str, Intake], tuple[Step, ...]] | str:
    """("up", and "gate" of gated forms; the steps from a pre-activation to its activation), or why they are unknown.

    The MLP's activation is ``f(up)``, or ``f(gate) * up``; the steps are those of f.
    """
    found: dict[int, Node] = {}
    todo, seen = [act], set()
    while todo:
        node = todo.pop()
        if id(node) not in seen and node.op != "leaf":
            seen.add(id(node))
            if _source(graph, node) is not None:
                found[id(node)] = node
            else:
                todo.extend(node.inputs)
    nodes = list(found.values())
    if len(nodes) == 1:
        named = {"up": nodes[0]}
        steps = _steps(graph, act, nodes[0])
    elif len(nodes) == 2:
        sides = _sides(act, nodes)
        if sides is None:
            return "its activations are not the product of one matrix's output and a function of another's"
        named = {"up": sides[0], "gate": sides[1]}
        steps = _steps(graph, sides[2], sides[1])
    else:
        return f"its activations are made of the outputs of {len(nodes)} matrices"
    if steps is None:
        return "its activation function is not a chain of modules and calls"
    intakes = {}
    for name, node in named.items():
        path, places = _source(graph, node) or ("", torch.empty(0))
        intake = _intake(graph, path, places.flatten(0, -2)[0], places)
        if isinstance(intake, str):
            return intake
        intakes[name] = intake
    return intakes, steps


def _sides(act: Node, nodes: list[Node]) -> tuple[Node, Node, Node] | None:
    """(up, gate, what the gate's function gives) of a product; None when it is none."""
    while act.op in SAME and len(act.inputs) == 1:
        act = act.inputs[0]
    if act.op not in MUL or len(act.inputs) != 2:
        return None
    for plain, curved in (act.inputs, act.inputs[::-1]):
        while plain.op in SAME and plain.inputs and plain not in nodes:
            plain = plain.inputs[0]
        if plain in nodes:
            return plain, nodes[1 - nodes.index(plain)], curved
    return None


def _steps(graph: LayerGraph, end: Node, start: Node) -> tuple[Step, ...] | None:
    """The steps from one node to another, each a module or a call with one tensor; None when the way branches."""
    steps: list[Step] = []
    while end is not start:
        module = next((p for p, _ in end.output_of if p in graph.frames and len(graph.frames[p].inputs) == 1), "")
        if module and graph.frames[module].inputs[0][1] is not end:
            steps.append(Step(module))
            end = graph.frames[module].inputs[0][1]
            continue
        moving = [(i, a) for i, a in enumerate(end.call[1]) if isinstance(a, Tensor)] if end.call else []
        if end.call is None or len(moving) != 1 or len(end.inputs) != 1:
            return None
        if end.op not in SAME:
            func, args, kwargs = end.call
            slot = moving[0][0]
            steps.append(
                Step(call=(func, [None if i == slot else a for i, a in enumerate(args)], dict(kwargs)), slot=slot)
            )
        end = end.inputs[0]
    return tuple(reversed(steps))


def _intake(graph: LayerGraph, path: str, rows: Tensor, places: Tensor) -> Intake | str:
    """The intake of the outputs ``rows`` [n]; ``places`` [..., n] must be the same everywhere."""
    if not bool((places == rows).all()):
        return "which of its matrix's outputs are meant depends on the position"
    source = graph.frames[path].inputs[0][1]
    out = graph.frames[path].outputs[0][1].shape[-1]
    every = len(rows) == out and bool((rows == torch.arange(out, device=rows.device)).all())
    return Intake(path, None if every else tuple(rows.tolist()), _norm(graph, source))


def _norm(graph: LayerGraph, node: Node) -> str:
    """Path of the norm that made ``node``; "" when none did."""
    while True:
        norm = next((p for p, _ in node.output_of if graph.is_norm(p)), "")
        if norm or node.op not in SAME or not node.inputs:
            return norm
        node = node.inputs[0]


def _source(graph: LayerGraph, node: Node) -> tuple[str, Tensor] | None:
    """(matrix, which of its outputs each number of ``node`` is); None when more than moves lie in between."""
    chain: list[Node] = []
    while not (path := next((p for p, _ in node.output_of if graph.linear(p)), "")):
        sources = [n for n in node.inputs if n.tensor.numel()]
        if node.op not in COPIES or len(sources) != 1 or node.call is None:
            return None
        chain.append(node)
        node = sources[0]
    places = torch.arange(node.shape[-1], device=node.tensor.device).expand(node.shape).contiguous()
    for step in reversed(chain):
        moved = _again(step, places)
        if moved is None or tuple(moved.shape) != step.shape:
            return None
        places = moved.long()  # a cat with an empty tensor makes them floats
    return path, places


def _again(step: Node, x: Tensor) -> Tensor | None:
    """What the call that made ``step`` gives for ``x`` in place of its input."""
    if step.op in CASTS or step.call is None:
        return x
    func, args, kwargs = step.call
    source = next(n.tensor for n in step.inputs if n.tensor.numel())

    def run(with_: Tensor) -> list[Tensor]:
        return list(tensors(func(*_put(args, source, with_), **_put(dict(kwargs), source, with_))))

    if len(made := run(x)) == 1:
        return made[0]
    place = (step.tensor.storage_offset(), step.tensor.shape, step.tensor.stride())
    which = [i for i, t in enumerate(run(source)) if (t.storage_offset(), t.shape, t.stride()) == place]
    return made[which[0]] if len(which) == 1 else None


def _put(value: Any, old: Tensor, new: Tensor) -> Any:
    if value is old:
        return new
    if isinstance(value, list | tuple):
        return type(value)(_put(v, old, new) for v in value) if not hasattr(value, "_fields") else value
    if isinstance(value, Mapping):
        return {k: _put(v, old, new) for k, v in value.items()}
    return value
