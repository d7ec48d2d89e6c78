"""Run a model once, watched, and read its anatomy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cutaway.core.errors import UnsupportedError
from cutaway.models.anatomy import read_layer, refused_layer
from cutaway.models.graph import MOVE, SAME, LayerGraph
from cutaway.models.plan import Anatomy, Layer, Step, Tap
from cutaway.models.recorder import Frame, Node, Recorder, tensors
from cutaway.models.upstream import input_embeddings

VISION = ("vision", "visual", "image", "vit", "pixel", "sam", "aligner")
OTHER = ("audio", "speech", "qformer", "resampler", "perceiver", "protein", "talker", "depth", "action", "mtp", "nextn")
MERGE = MOVE | {
    "masked_scatter",
    "masked_scatter_",
    "__setitem__",
    "index_put",
    "index_put_",
    "index_copy",
    "where",
    "cat",
}
MERGE |= {"concat", "stack", "add", "__add__", "__iadd__", "mul", "__mul__", "index_select", "scatter", "pad", "vstack"}


def _tokens(path: str) -> set[str]:
    return set(path.lower().replace("_", ".").split("."))


def _is(path: str, words: Sequence[str]) -> bool:
    return any(token.startswith(word) for token in _tokens(path) for word in words)


def _encodes(path: str) -> bool:
    """Whether a path lies in an encoder; ``decoder.bert.encoder.layer`` lies in a decoder."""
    words = path.lower().replace("_", ".").split(".")
    return next((word for word in words if word in ("encoder", "decoder")), "") == "encoder"


def find_stacks(hf: nn.Module) -> dict[str, list[str]]:
    """Module paths of the layers of each scope: "" for the language model, "vision" for the vision tower.

    Raises UnsupportedError when the model has no list of layers.
    """
    lists = {p: m for p, m in hf.named_modules() if isinstance(m, nn.ModuleList) and any(True for _ in m.parameters())}
    outer = {p: m for p, m in lists.items() if not any(p.startswith(q + ".") for q in lists)}
    config: Any = hf.config
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    text = {p: m for p, m in outer.items() if not _is(p, VISION) and not _is(p, OTHER)}
    if any("decoder" in _tokens(p) for p in text):
        text = {p: m for p, m in text.items() if not _encodes(p)}
    vision = {p: m for p, m in outer.items() if _is(p, VISION) and not _is(p, OTHER)}
    if not text:
        raise UnsupportedError(f"the layers of {type(hf).__name__}", "it has no list of layers", "see docs/support")

    def rank(module: nn.ModuleList, depth: int | None) -> tuple[bool, bool, int]:
        attends = any("att" in name.lower() for name, _ in module.named_modules())
        return attends, len(module) == depth, sum(p.numel() for p in module.parameters())

    best = max(text, key=lambda p: rank(text[p], depth))
    stacks = {"": [f"{best}.{i}" for i in range(len(text[best]))]}
    if vision:
        tower = max(vision, key=lambda p: rank(vision[p], None))
        stacks["vision"] = [f"{tower}.{i}" for i in range(len(vision[tower]))]
    return stacks


class Probe:
    """One recorded forward pass, turned into an Anatomy layer by layer so that little is kept alive."""

    def __init__(self, hf: nn.Module) -> None:
        self.hf = hf
        self.stacks = find_stacks(hf)
        self.scope_of = {path: scope for scope, paths in self.stacks.items() for path in paths}
        self.layers: dict[str, Layer] = {}
        self.frames: dict[str, Frame] = {}
        self.ran: Counter[str] = Counter()
        self.projector: Tap | None = None
        self.why_no_projector = "no image was given, or the model merges its features in a way that is not understood"
        self.last: Tensor | None = None
        embeddings = input_embeddings(hf)
        self.embed = next((p for p, m in hf.named_modules() if m is embeddings), "")
        self.embedded = False
        self.batch = 1

    def run(self, kwargs: Mapping[str, Any]) -> Anatomy:
        """The anatomy, from a forward pass on ``kwargs``."""
        prompt = kwargs.get("decoder_input_ids", kwargs.get("input_ids"))
        self.batch = next((t.shape[0] for t in tensors(prompt)), 1)
        self.recorder = Recorder(self.hf, self._exit)
        with torch.no_grad(), self.recorder:
            out = self.hf(**kwargs)
            logits = getattr(out, "logits", None)
            tail = self._tail(logits) if isinstance(logits, Tensor) else "the model returns no logits"
        return self._anatomy(tail)

    def _exit(self, frame: Frame) -> None:
        earlier = self.frames.get(frame.path)
        frame.runs = earlier.runs + 1 if earlier is not None else 1
        self.frames[frame.path] = frame
        self.embedded |= frame.path == self.embed
        scope = self.scope_of.get(frame.path)
        if scope is None:
            return
        if "vision" in self.stacks and frame.path == self.stacks[""][0]:
            self._find_projector(frame)
        inside = {p: f for p, f in self.frames.items() if p.startswith(frame.path + ".")}
        nodes = self.recorder.nodes
        text = scope == ""
        if frame.inputs and frame.outputs:
            start = next((n for _, n in frame.inputs if n.tensor.is_floating_point()), frame.inputs[0][1])
            batch = self.batch if text else (1 if start.tensor.ndim == 2 else start.shape[0])
            graph = LayerGraph(self.hf, frame, inside, nodes, batch)
            with self.recorder.paused():
                layer = read_layer(graph)
                if text and frame.path != self.stacks[""][0] and self.last is not None:
                    inserted = not _same(self.last, graph.start.tensor)
                    layer = replace(layer, inserted=inserted, between=self._between(frame.path) if inserted else "")
            self.layers[frame.path] = layer
            self.ran[frame.path] += 1
            if text:
                self.last = graph.end.tensor
        self.frames.clear()
        self.recorder.forget()

    def _find_projector(self, frame: Frame) -> None:
        start = next((n for _, n in frame.inputs if n.tensor.is_floating_point()), None)
        todo, seen = [start] if start is not None else [], set()
        while todo:
            node = todo.pop(0)
            if id(node) in seen:
                continue
            seen.add(id(node))
            outs = [(p, s) for p, s in node.output_of if p != self.embed and _is_projector(p, self.stacks)]
            if outs:
                path, slot = outs[-1]
                self.projector = Tap("out", path, slot, clone=node.overwritten)
                return
            if node.op in MERGE:
                todo.extend(n for n in node.inputs if not any(p == self.embed for p, _ in n.output_of))

    def _tail(self, logits: Tensor) -> tuple[Step, ...] | str:
        steps: list[Step] = []
        node = self.recorder.node(logits)
        while node.tensor is not self.last:
            places = [p for p, _ in node.output_of if p in self.frames and not self._holds_layers(p)]
            ran = [p for p in reversed(places) if len(self.frames[p].inputs) == 1]
            path = next((p for p in ran if self.frames[p].inputs[0][1] is not node), "")  # an identity is no step
            if path:
                steps.append(Step(path))
                node = self.frames[path].inputs[0][1]
                continue
            call = node.call
            nexts = [(i, a) for i, a in enumerate(call[1]) if isinstance(a, Tensor)] if call else []
            moving = [(i, self._known(node, a)) for i, a in nexts]
            moving = [(i, n) for i, n in moving if n.op != "leaf" or n.output_of or n.tensor is self.last]
            if len(moving) != 1 or call is None:
                return f"the way from the last residual stream to the logits branches at {node.op!r}"
            slot, source = moving[0]
            if source.shape == node.shape and node.op in SAME | {"__getitem__"}:
                node = source  # a view or a slice that takes everything: it would fix the length of this run
                continue
            func, args, kw = call
            steps.append(Step(call=(func, [None if i == slot else a for i, a in enumerate(args)], dict(kw)), slot=slot))
            node = source
        return self._proven(tuple(reversed(steps)), logits)

    def _proven(self, steps: tuple[Step, ...], logits: Tensor) -> tuple[Step, ...] | str:
        """The steps, if they give the logits of the last position alone."""
        x = self.last
        if x is None or x.ndim != 3 or logits.shape[:2] != x.shape[:2]:
            return f"logits {list(logits.shape)} do not stand for the positions of the last residual stream"
        with self.recorder.paused():
            x = x[:, -1:]
            try:
                for step in steps:
                    x = step.run(self.hf, x)
            except (RuntimeError, TypeError) as error:
                return f"its steps to the logits need the whole prompt ({str(error).splitlines()[0]})"
        if x.shape != logits[:, -1:].shape or not torch.allclose(x, logits[:, -1:], rtol=1e-3, atol=1e-4):
            return "its steps to the logits, taken for the last position alone, give other logits"
        return steps

    @staticmethod
    def _known(node: Node, tensor: Tensor) -> Node:
        return next(n for n in node.inputs if n.tensor is tensor)

    def _holds_layers(self, path: str) -> bool:
        return any(layer.startswith(path + ".") or path == "" for layer in self.scope_of)

    def _between(self, path: str) -> str:
        """The module, outside of all layers, that took in what the layer before gave."""
        outside = [f for p, f in self.frames.items() if p != path and not p.startswith(path + ".") and f.inputs]
        return next((f.path for f in reversed(outside) if any(n.tensor is self.last for _, n in f.inputs)), "")

    def _layer(self, scope: str, path: str) -> Layer:
        if not scope and self.ran[path] > 1:  # a vision tower may run once per image
            return refused_layer(path, f"it runs {self.ran[path]} times in one pass: which is meant cannot be said")
        return self.layers.get(path) or refused_layer(path, "it did not run in the pass that the anatomy was read from")

    def _anatomy(self, tail: tuple[Step, ...] | str) -> Anatomy:
        stacks: dict[str, tuple[Layer, ...]] = {}
        for scope, paths in self.stacks.items():
            if any(p in self.layers for p in paths):
                stacks[scope] = tuple(self._layer(scope, p) for p in paths)
            elif scope == "":
                missing = paths[0]
                raise UnsupportedError(
                    f"the layers of {type(self.hf).__name__}",
                    f"{missing!r} was not run in a forward pass",
                    "see docs/support",
                )
        refused: dict[str, str] = {"sae": "no dictionary is attached"}
        taps = {"embed": Tap("out", self.embed)} if self.embed and self.embedded else {}
        if not taps:
            refused["embed"] = "its token embedding is not a module of its own"
        steps = () if isinstance(tail, str) else tail
        if isinstance(tail, str):
            refused["final_norm"] = refused["readout"] = tail
        else:
            head = max((i for i, s in enumerate(steps) if s.module), default=-1)
            if head < 0:
                refused["final_norm"] = "no module makes the logits"
            else:
                taps["final_norm"] = Tap("in", steps[head].module, 0)
        if self.projector is not None:
            taps["projector"] = self.projector
        else:
            refused["projector"] = self.why_no_projector if "vision" in self.stacks else "the model has no vision tower"
        unread = frozenset(self.stacks.keys() - stacks.keys())
        return Anatomy(stacks, taps, steps, refused, stacks[""][0].d_model, unread)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a.to(b.device), b))


def _is_projector(path: str, stacks: Mapping[str, Sequence[str]]) -> bool:
    """A module outside both stacks' layers, not the root and none that holds the layers of the language model."""
    language = stacks[""][0]
    return bool(path) and not language.startswith(path + ".") and not any(path.startswith(p + ".") for p in stacks[""])


def probe(hf: nn.Module, kwargs: Mapping[str, Any]) -> Anatomy:
    """The anatomy of ``hf`` from one forward pass on ``kwargs``; the model is left as it was.

    Raises:
        UnsupportedError: no list of layers, or a layer that does not run.
    """
    return Probe(hf).run(kwargs)
