"""Edge attribution patching with integrated gradients: what corrupting each edge would do, to first order.

    score(u -> v)  =  sum over tokens of  < out_u(corrupt) - out_u(clean),  mean over steps of  d metric / d in_v >

The gradient is that of the one receiver's own reading of the residual stream, through its norm and its matrix. Of each
step only what is as wide as the matrices' outputs is kept: gradients over the norm's scale add up before they are
brought to the stream, so the steps cost one forward and one backward pass each and little else. Nothing as large as
edges times positions is ever made: the largest tensor is [sender, row, pos, d], of as many rows as a budget holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Apply, Intervention, Set, Where
from cutaway.core.progress import track
from cutaway.ops.fronts import Front, Intake, Pull, final_intake
from cutaway.ops.pairs import Measure, Pairs, at_reads, read_logits, through_tail
from cutaway.ops.senders import Senders, chunks
from cutaway.ops.watched import WatchedModel
from cutaway.ops.wiring import SIDES, Wiring

BUDGET = 2**28
"""Bytes that the senders' changes of one chunk of pairs may take; while they are made, twice that."""


@dataclass(frozen=True)
class EdgeScores:
    """Scores of all edges, mean over pairs.

    Attributes:
        scores: [sender, receiver]; 0 where there is no edge.
        scale: [sender, receiver] the part of it that comes from moving the scale of the receiver's own norm.
        clean, corrupt: [pair] the measure of the plain run, and with everything replaced.
        embedding: the first-order effect of replacing the embedding, by its own gradient.
    """

    scores: Tensor
    scale: Tensor
    clean: Tensor
    corrupt: Tensor
    embedding: float

    @property
    def error(self) -> float:
        """How far the edges out of the embedding are from its own gradient, relative to their size.

        The gradient at the embedding is the sum of those of all receivers, so this is 0 but for rounding.
        """
        size = float(self.scores[0].abs().sum()) or 1.0
        return abs(float(self.scores[0].sum()) - self.embedding) / size


def path_points(steps: int) -> list[float]:
    """How far from the corrupt to the clean embedding each gradient is taken: 1/m, ..., 1; the clean run when m = 1."""
    return [k / steps for k in range(1, steps + 1)]


def edge_scores(
    model: WatchedModel,
    pairs: Pairs,
    wiring: Wiring,
    fronts: Sequence[Front],
    points: Sequence[float],
    budget: int = BUDGET,
    senders: Senders | None = None,
) -> EdgeScores:
    """The scores of all edges, with gradients at these points of the straight line from corrupt (0) to clean (1)."""
    senders = senders or Senders(model, wiring)
    tokens, d = pairs.clean.ids.shape[1], model.layers[0].d_model
    size = 4 * len(wiring.senders) * tokens * d
    rows = track(chunks(len(pairs), size, budget, at_once=not pairs.has_images), "edges")
    total = reduce(_together, (_chunk(model, pairs.take(some), wiring, fronts, points, senders) for some in rows))
    n = len(pairs)
    return EdgeScores(total.scores / n, total.scale / n, total.clean, total.corrupt, total.embedding / n)


def _together(total: EdgeScores, more: EdgeScores) -> EdgeScores:
    """The scores of two chunks, still sums over their pairs."""
    return EdgeScores(
        total.scores.add_(more.scores),
        total.scale.add_(more.scale),
        torch.cat([total.clean, more.clean]),
        torch.cat([total.corrupt, more.corrupt]),
        total.embedding + more.embedding,
    )


def _chunk(
    model: WatchedModel,
    pairs: Pairs,
    wiring: Wiring,
    fronts: Sequence[Front],
    points: Sequence[float],
    senders: Senders,
) -> EdgeScores:
    reads = pairs.measure.reads(pairs.clean)
    replacement = senders.replacement(pairs)
    clean, last = senders.run(pairs.clean)
    embed = clean[0].clone()
    padding = ~pairs.clean.mask.to(clean.device, torch.bool)[None, :, :, None]
    change = clean.neg_().add_(replacement).masked_fill_(padding, 0.0)  # in place: it is the largest tensor there is
    del clean, replacement
    with torch.no_grad():
        clean_logits = read_logits(model, last, reads)
        measure = pairs.measure.against(clean_logits)
        corrupt = measure.of(read_logits(model, last.float() + change.sum(0), reads))
    total = _Sums(model, wiring, fronts, change)
    for point in points:
        total.step(pairs.clean, measure, embed + (1 - point) * change[0])
    scores, embedding = total.scores(len(points))
    return EdgeScores(scores, -total.lost / len(points), measure.of(clean_logits), corrupt, embedding)


@dataclass
class _Seen:
    """What one pass showed: matrices' inputs and outputs, norms' inputs and outputs, and the MLP's inputs, by layer."""

    given: dict[str, Tensor] = field(default_factory=dict)
    out: dict[str, Tensor] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, path: str) -> Any:
        """A hook that keeps a module's input and output."""

        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            self.given[path] = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
            self.out[path] = out

        return hook

    def pull(self, intake: Intake, n: Tensor) -> Pull:
        """The derivative of a norm in this pass, whose output was ``n``."""
        given = self.given[intake.path].detach() if intake.path else n.detach()
        return intake.pull(given.reshape(n.shape), n.detach())


class _Sums:
    """Gradients of all receivers, summed over steps; and what the norms' moving scales take off the scores."""

    def __init__(self, model: WatchedModel, wiring: Wiring, fronts: Sequence[Front], change: Tensor) -> None:
        self.model, self.wiring, self.fronts = model, wiring, fronts
        self.change, self.intake = change, final_intake(model)
        self.flat = change.flatten(1, 2)  # [sender, token, d]
        self.matrix: dict[str, Tensor] = {}
        self.mlp: dict[int, Tensor] = {}
        self.logits: Tensor | None = None
        self.embedding: Tensor | None = None
        self.lost = torch.zeros(len(wiring.senders), len(wiring.receivers), device=change.device)

    def step(self, inputs: Inputs, measure: Measure, embed: Tensor) -> None:
        """Add the gradients of one run that starts from the residual stream ``embed`` [row, pos, d]."""
        seen, embed = _Seen(), embed.requires_grad_()
        states = self._run(inputs, embed, seen)
        reads = measure.reads(inputs)
        x = at_reads(states, reads)
        normed, logits = through_tail(self.model, x)
        value = measure.of(logits).sum()
        paths = list(dict.fromkeys(path for front in self.fronts for path in front.matrices))
        at = [*(seen.out[path] for path in paths), *seen.mlp.values(), normed, states, embed]
        found = torch.autograd.grad(value, at, allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(found, at, strict=True)]
        with torch.no_grad():
            self.logits = _sum(self.logits, grads[-2].float())
            self.embedding = _sum(self.embedding, grads[-1].float())
            self._final(
                x.detach().flatten(0, 1), normed.detach()[0], grads[-3][0].float(), at_reads(self.change, reads)
            )
            by_path = dict(zip(paths, grads, strict=False))
            by_layer = dict(zip(seen.mlp, grads[len(paths) : -3], strict=True))
            for i, front in enumerate(self.fronts):
                self._attention(i, front, seen, by_path)
                self._mlp(i, front, seen, by_layer[i].float())

    def _run(self, inputs: Inputs, embed: Tensor, seen: _Seen) -> Tensor:
        last = f"L{len(self.fronts) - 1}.resid_post"

        def keep(x: Tensor, where: Where) -> Tensor:
            seen.mlp[where.site.layer] = own = x.view_as(x)
            return own

        do: list[Intervention] = [Set("L0.resid_pre", embed)]
        with ExitStack() as exits:
            for i, front in enumerate(self.fronts):
                norms = [intake.path for intake in (front.attention, front.mlp) if intake.path]
                for path in dict.fromkeys([*front.matrices, *norms]):
                    module = self.model.hf.get_submodule(path)
                    exits.callback(module.register_forward_hook(seen.keep(path), with_kwargs=True).remove)
                if not front.at_norm:
                    do.append(Apply(f"L{i}.mlp.in", keep))
            trace = self.model.trace(inputs, want=last, do=do, grad=True, stop=True)
        for i, front in enumerate(self.fronts):
            if front.at_norm:
                seen.mlp[i] = seen.out[front.mlp.path]
        return trace[last]

    def _attention(self, i: int, front: Front, seen: _Seen, grads: dict[str, Tensor]) -> None:
        pull = seen.pull(front.attention, seen.given[front.matrices[0]])
        for path in front.matrices:
            g = grads[path].float().reshape(*pull.inverse.shape, -1)
            self.matrix[path] = _sum(self.matrix.get(path), g * pull.inverse[..., None])
        block, n = self.wiring.block(i), self.wiring.first(i)
        moved = pull.moving(self.flat[:n])
        if moved is None or front.attention.norm is None:
            return
        along = []
        for side in (front.sides[name] for name in SIDES):
            offset = self.model.hf.get_submodule(side.path)(front.attention.norm.shift[None].to(self.model.dtype))[0]
            out = seen.out[side.path].detach().float() - offset.float()
            product = (grads[side.path].float() * out).flatten(0, -2)
            along.append(product[:, side.columns.flatten()].unflatten(-1, tuple(side.columns.shape)).sum(-1))
        self.lost[:n, block.start : block.stop] += moved @ torch.cat(along, dim=1)

    def _mlp(self, i: int, front: Front, seen: _Seen, g: Tensor) -> None:
        pull = seen.pull(front.mlp, seen.mlp[i])
        g = g.reshape(*pull.inverse.shape, -1)
        pulled = front.mlp.rows(g) * pull.inverse[..., None]
        self.mlp[i] = _sum(self.mlp.get(i), pulled)
        receiver = self.wiring.block(i).stop
        n = self.wiring.receivers[receiver].reads
        moved = pull.moving(self.flat[:n])
        if moved is not None and pull.x is not None:
            self.lost[:n, receiver] += moved @ (pull.x * pulled).sum(-1).flatten()

    def _final(self, x: Tensor, normed: Tensor, g: Tensor, change: Tensor) -> None:
        """The part of the logits' scores that comes from moving the final norm's scale; their gradient has it in."""
        if self.intake is None or self.intake.norm is None:
            return
        pull = self.intake.pull(x, normed)
        moved = pull.moving(change.flatten(1, 2))
        if moved is not None and pull.x is not None:
            pulled = self.intake.rows(g) * pull.inverse[..., None]
            self.lost[:, -1] += moved @ (pull.x * pulled).sum(-1).flatten()

    def scores(self, steps: int) -> tuple[Tensor, float]:
        """([sender, receiver], effect of the embedding by its own gradient), mean over the steps."""
        found = -self.lost
        wide = self.change.flatten(1)  # [sender, token * d]
        for i, front in enumerate(self.fronts):
            n, start = self.wiring.first(i), self.wiring.block(i).start
            for side in (front.sides[name] for name in SIDES):
                heads, c = side.columns.shape
                g = self.matrix[side.path].flatten(0, -2)[:, side.columns.flatten()]
                rows = front.attention.rows(side.rows(self.model)[0])
                pulled = torch.bmm(g.unflatten(-1, (heads, c)).transpose(0, 1), rows)  # [head, token, d]
                found[:n, start : start + heads] += wide[:n] @ pulled.flatten(1).T
                start += heads
            reads = self.wiring.receivers[start].reads
            found[:reads, start] += wide[:reads] @ self.mlp[i].flatten()
        if self.logits is not None:
            found[:, -1] = wide @ self.logits.flatten()
        direct = float((self.change[0] * self.embedding).sum()) if self.embedding is not None else 0.0
        return found / steps, direct / steps


def _sum(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)
