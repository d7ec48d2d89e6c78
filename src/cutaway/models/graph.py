"""The recorded graph of one layer, and the questions that its anatomy is read from.

No architecture is named here. A layer's residual trunk is the chain of additions from what enters it to what leaves it;
the matrices that write neurons and heads are the linear modules behind the addends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from cutaway.models.plan import Attention, Tap
from cutaway.models.recorder import AttentionCall, Frame, Node, tensors
from cutaway.models.selfcheck import random_numbers_kept

Slot = TypeVar("Slot")
ADD = {"add", "__add__", "__radd__", "__iadd__", "add_"}
MUL = {"mul", "__mul__", "__rmul__", "__imul__", "mul_", "div", "__truediv__", "true_divide"}
SAME = {
    "to",
    "contiguous",
    "clone",
    "type",
    "float",
    "half",
    "bfloat16",
    "type_as",
    "dropout",
    "view",
    "reshape",
    "squeeze",
}
SAME |= {"unsqueeze", "flatten", "unflatten", "view_as", "detach", "dropout_", "alpha_dropout"}
CUT = {"__getitem__", "split", "chunk", "unbind", "tensor_split"}
MOVE = SAME | {
    "transpose",
    "permute",
    "swapaxes",
    "movedim",
    "expand",
    "repeat_interleave",
    "__getitem__",
    "split",
    "chunk",
    "unbind",
    "narrow",
}
HEARS = 0.02  # how far a term must move, of its size, when the position before is another; rounding moves it less
PRODUCTS = {"matmul", "bmm", "einsum", "__matmul__", "baddbmm"}


@dataclass(frozen=True)
class Addend:
    """One term added to the trunk: the term, the sum, the state after it, the norm in between (post-norm layers)."""

    node: Node
    total: Node
    state: Node
    norm: str = ""


class LayerGraph:
    """The recorded graph of one layer, and the questions asked of it."""

    def __init__(self, root: nn.Module, frame: Frame, frames: dict[str, Frame], nodes: list[Node], batch: int) -> None:
        self.root, self.frame, self.frames, self.nodes, self.batch = root, frame, frames, nodes, batch
        self.start_slot, self.start = self._start()
        shape = self.start.shape
        self.end_slot, self.end = next(((s, n) for s, n in frame.outputs if n.shape == shape), (None, self.start))

    def _start(self) -> tuple[int | str, Node]:
        named = dict(self.frame.inputs)
        for slot in ("hidden_states", "x", 0):
            if slot in named and named[slot].tensor.is_floating_point():
                return slot, named[slot]
        return next(((s, n) for s, n in self.frame.inputs if n.tensor.is_floating_point()), self.frame.inputs[0])

    # -- the trunk ------------------------------------------------------------------------------------------------
    def trunk(self) -> list[Addend] | None:
        """The addends from the layer's input to its output in order; None when the layer is not such a chain."""
        seen: dict[int, list[Addend] | None] = {}

        def walk(node: Node) -> list[Addend] | None:
            if node is self.start:
                return []
            if id(node) not in seen:
                seen[id(node)] = None
                seen[id(node)] = step(node)
            return seen[id(node)]

        def step(node: Node) -> list[Addend] | None:
            if node.op in ADD and len(node.inputs) == 2 and not (node.call and node.call[2].get("alpha")):
                for trunk, term in (node.inputs, node.inputs[::-1]):
                    if term.op != "leaf" or term is self.start:
                        before = walk(trunk)
                        if before is not None:
                            return [*before, Addend(term, node, node)]
            norm = next((p for p, _ in node.output_of if self.is_norm(p)), "")
            if norm:
                before = walk(self.frames[norm].inputs[0][1])
                if before and not before[-1].norm:
                    return [*before[:-1], replace(before[-1], norm=norm, state=node)]
                return None
            if node.op in SAME and node.inputs:
                before = walk(node.inputs[0])
                if before:
                    before = (
                        [*before[:-1], replace(before[-1], state=node)] if node.shape == self.start.shape else before
                    )
                return before
            return None

        return walk(self.end)

    def is_norm(self, path: str) -> bool:
        """Whether the module at ``path`` is called a norm."""
        name = type(self.root.get_submodule(path)).__name__.lower()
        return path in self.frames and bool(self.frames[path].inputs) and ("norm" in name or name.endswith("ln"))

    def terms(self, node: Node, attends: Callable[[Node], bool]) -> list[Node]:
        """The parts of one addend: attention's and the MLP's are told apart when both were added up first."""
        if node.op in ADD and len(node.inputs) == 2 and not any(self._constant(part) for part in node.inputs):
            first, second = (attends(part) for part in node.inputs)
            if first != second:
                return [t for part in node.inputs for t in self.terms(part, attends)]
        return [node]

    def _constant(self, node: Node) -> bool:
        """Whether ``node`` is nothing but a parameter or a buffer, such as a bias that is added by itself."""
        while node.op in MOVE | {"expand_as"} and node.inputs:
            node = node.inputs[0]
        return node.op == "leaf" and node is not self.start

    def depends(self, node: Node, calls: list[AttentionCall], stops: set[int]) -> bool:
        """Whether ``node`` was made from an attention result without passing through the trunk."""
        goals, seen, todo = {id(c.z) for c in calls}, set(stops), [node]
        while todo:
            current = todo.pop()
            if id(current) in goals:
                return True
            if id(current) not in seen or current is node:
                seen.add(id(current))
                todo.extend(n for n in current.inputs if id(n) not in seen)
        return False

    # -- attention ------------------------------------------------------------------------------------------------
    def attention_calls(self) -> list[AttentionCall]:
        """Attention calls that ran in this layer: those seen as calls, else those spelled out as softmax products."""
        if self.frame.calls:
            return self.frame.calls
        return [call for node in self.nodes if node.op == "softmax" and (call := self._inline(node)) is not None]

    def _inline(self, softmax: Node) -> AttentionCall | None:
        if softmax.tensor.ndim < 3 or softmax.key is None:
            return None
        product = next(
            (n for n in self.nodes if n.op in PRODUCTS and n.inputs and self._leads(n.inputs[0], softmax)), None
        )
        scores = self._first_product(softmax.inputs[0])
        if product is None or scores is None or product.inputs[0].shape[-1] != product.inputs[1].shape[-2]:
            return None
        q, k = scores.inputs[-2:]
        return AttentionCall(softmax.key.owner, "inline", q, k, product.inputs[1], product, scores, softmax)

    def _leads(self, node: Node, goal: Node) -> bool:
        while node is not goal and node.op in MOVE and node.inputs:
            node = node.inputs[0]
        return node is goal

    def _first_product(self, node: Node) -> Node | None:
        seen: set[int] = set()
        todo = [node]
        while todo:
            current = todo.pop(0)
            if current.op in PRODUCTS and len(current.inputs) >= 2:
                return current
            if id(current) not in seen and current.op not in ("linear", "leaf"):
                seen.add(id(current))
                todo.extend(current.inputs)
        return None

    def describe(self, calls: list[AttentionCall]) -> Attention | str:
        """The layer's attention, or the reason why its insides cannot be told."""
        call = calls[0]
        if len({c.module for c in calls}) > 1:
            calls = [c for c in calls if c.module == call.module]
        q, k, v, z = (n.shape for n in (call.q, call.k, call.v, call.z))
        keys = {}
        flat = len(q) == 3
        if call.how == "inline":
            if call.scores is None or call.pattern is None or not (call.scores.key and call.pattern.key and call.z.key):
                return "its attention is not made of the torch calls that are understood"
            keys = {"qk": call.scores.key, "softmax": call.pattern.key, "pv": call.z.key}
            k = (*k[:-2], k[-1], k[-2])
            if len({key.owner for key in keys.values()}) > 1:
                return "its attention is spread over several modules"
        if flat:
            if q[0] % self.batch:
                return f"its attention runs on {q[0]} rows for a batch of {self.batch}"
            q, k, v = ((self.batch, s[0] // self.batch, *s[1:]) for s in (q, k, v))
            z = (self.batch, z[0] // self.batch, *z[1:]) if len(z) == 3 else z
        if len(q) != 4 or len(z) != 4 or q[0] != self.batch:
            return f"its attention runs on query blocks of shape {list(q)}, which are not [batch, head, pos, d_head]"
        if len(calls) > 1 and q[2] == self.start.shape[-2]:  # a vision tower calls it once per part of the positions
            return f"its attention is called {len(calls)} times on all {q[2]} positions"
        heads_first = z[1] == q[1] and z[2] == q[2]
        if call.how == "interface" and z[1] == q[2] and z[2] == q[1]:
            heads_first = False
        changed = frozenset(side for side, node in (("q", call.q), ("k", call.k)) if not self._projected(node))
        return Attention(call.module, call.how, q[1], k[1], q[3], z[3], len(calls), heads_first, flat, keys, changed)

    def _projected(self, node: Node) -> bool:
        """Whether ``node`` is a matrix's output as it came, cut into heads at most."""
        while not any(self.linear(path) for path, _ in node.output_of):
            if node.op not in MOVE | CUT or not node.inputs:
                return False
            node = node.inputs[0]
        return True

    # -- matrices -------------------------------------------------------------------------------------------------
    def linear(self, path: str) -> bool:
        """Whether the module at ``path`` is one matrix (nn.Linear, GPT-2's Conv1D and their like)."""
        weight = getattr(self.root.get_submodule(path), "weight", None)
        frame = self.frames.get(path)
        once = frame is not None and frame.runs == 1 and len(frame.inputs) == 1
        return once and isinstance(weight, Tensor) and weight.ndim == 2

    def writer(self, node: Node) -> str:
        """Path of the matrix whose output, perhaps normed or scaled, ``node`` is; "" when it is not one matrix."""
        return self._behind(node, self.linear)

    def _behind(self, node: Node, wanted: Callable[[str], bool]) -> str:
        """Path of the ``wanted`` module whose output, perhaps normed or scaled, ``node`` is; "" when there is none."""
        while True:
            found = next((p for p, _ in node.output_of if wanted(p)), "")
            if found:
                return found
            norm = next((p for p, _ in node.output_of if self.is_norm(p)), "")
            if norm:
                node = self.frames[norm].inputs[0][1]
            elif node.op in MOVE and node.inputs:
                node = node.inputs[0]
            elif node.op in MUL | ADD and [n.op == "leaf" for n in node.inputs].count(False) == 1:
                node = next(n for n in node.inputs if n.op != "leaf")
            else:
                return ""

    def norm_behind(self, node: Node) -> str:
        """Path of the norm that ``node`` comes out of, perhaps multiplied; "" when none."""
        while True:
            norm = next((p for p, _ in node.output_of if self.is_norm(p)), "")
            moving = [n for n in node.inputs if n.op != "leaf"]
            if norm or node.op not in SAME | MUL or len(moving) != 1:
                return norm
            node = moving[0]

    def mixes(self, term: Node) -> bool:
        """Whether a term at one position hears of the position before, measured on the module that makes it.

        Convolutions, linear attention and state spaces do; what is made by no module of its own is taken not to.
        """
        path = self._behind(term, self._works_alone)
        if not path:
            return False
        module, frame = self.root.get_submodule(path), self.frames[path]
        slot, node = next((s, n) for s, n in frame.inputs if n.tensor.is_floating_point())
        changed = node.tensor.clone()
        changed[:, -2] = changed[:, 0]
        args, kwargs = list(frame.args), dict(frame.kwargs)
        ends = []
        for x in (node.tensor, changed):
            if isinstance(slot, int):
                args[slot] = x
            else:
                kwargs[slot] = x
            with random_numbers_kept([x.device]):
                torch.manual_seed(0)
                ends.append(next(tensors(module(*args, **kwargs)))[:, -1].float())
        return float((ends[1] - ends[0]).norm()) > HEARS * float(ends[0].norm())

    def _works_alone(self, path: str) -> bool:
        """Whether a module inside the layer makes more of several positions than a matrix or a norm does."""
        frame = self.frames.get(path)
        if frame is None or not path.startswith(self.frame.path + ".") or frame.runs != 1:
            return False
        if self.linear(path) or self.is_norm(path):
            return False
        streams = [n.shape for _, n in frame.inputs if n.tensor.is_floating_point()]
        return bool(streams) and len(streams[0]) == 3 and streams[0][0] == self.batch and streams[0][1] > 2

    def head_writer(self, z: Node) -> str:
        """Path of the matrix that reads ``z``; "" when none does."""
        for path, frame in self.frames.items():
            if self.linear(path):
                todo, seen = [frame.inputs[0][1]], set()
                while todo:
                    node = todo.pop()
                    if node is z:
                        return path
                    if id(node) not in seen and node.op in MOVE | MUL | {"cat", "concat", "stack"}:
                        seen.add(id(node))
                        if node.op not in MUL or sum(self._made_from(n, z) for n in node.inputs) == 1:
                            todo.extend(node.inputs)
        return ""

    def gated(self, path: str) -> bool:
        """Whether what the matrix at ``path`` reads is multiplied by something else that the layer computes."""
        todo, seen = [self.frames[path].inputs[0][1]], set()
        while todo:
            node = todo.pop()
            moving = [n for n in node.inputs if n.op != "leaf"]
            if node.op in MUL and len(moving) == 2:
                return True
            if id(node) not in seen and node.op in MOVE | MUL:
                seen.add(id(node))
                todo.extend(moving)
        return False

    def _made_from(self, node: Node, source: Node) -> bool:
        todo, seen = [node], {id(self.start)}
        while todo:
            current = todo.pop()
            if current is source:
                return True
            if id(current) not in seen:
                seen.add(id(current))
                todo.extend(current.inputs)
        return False

    def mlp_input(self, act: Node) -> Tap | None:
        """Where the MLP takes in the tensor from which its first matrices make ``act``; None when there are several."""
        sources: dict[int, Node] = {}
        matrices: list[str] = []
        todo, seen = [act], set()
        while todo:
            node = todo.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            matrix = next((p for p, _ in node.output_of if self.linear(p)), "")
            if matrix:
                matrices.append(matrix)
                source = self.frames[matrix].inputs[0][1]
                sources[id(source)] = source
            else:
                todo.extend(node.inputs)
        if len(sources) != 1:
            return None
        source = next(iter(sources.values()))
        holders = [(p, s) for p, s in source.input_of if all((m + ".").startswith(p + ".") for m in matrices)]
        inside = self._inside(holders)
        return Tap("in", *min(inside, key=lambda h: h[0].count(".")), clone=source.overwritten) if inside else None

    # -- taps -----------------------------------------------------------------------------------------------------
    def _inside(self, places: Sequence[tuple[str, Slot]]) -> list[tuple[str, Slot]]:
        """Places of modules inside the layer that ran once: a dropout used twice would be tapped twice."""
        return [(p, s) for p, s in places if p.startswith(self.frame.path + ".") and self.frames[p].runs == 1]

    def read_tap(self, node: Node) -> Tap | None:
        """Where ``node`` is read most cheaply."""
        outs = self._inside(node.output_of)
        if outs:
            return Tap("out", *outs[-1], clone=node.overwritten)
        ins = self._inside(node.input_of)
        if ins:
            return Tap("in", *ins[0], clone=node.overwritten)
        return self.op_tap(node)

    def write_tap(self, node: Node) -> Tap | None:
        """Where ``node`` is replaced for all that read it."""
        outs = self._inside(node.output_of)
        return Tap("out", *outs[-1], clone=node.overwritten) if outs else self.op_tap(node)

    def op_tap(self, node: Node) -> Tap | None:
        """The torch call that made ``node``."""
        if node.key is None or not (node.key.owner + ".").startswith(self.frame.path + "."):
            return None
        return Tap("op", node.key.owner, None, node.key, clone=node.overwritten)

    def experts(self) -> str:
        """Path of the layer's experts module that transformers' experts interface serves; "" when there is none."""
        for path in self.frames:
            module = self.root.get_submodule(path)
            if hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "_apply_gate"):
                return path
        return ""
