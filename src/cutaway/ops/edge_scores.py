"""Edge attribution patching with integrated gradients: what corrupting each edge would do, to first order.

    score(u -> v)  =  sum over tokens of  < out_u(corrupt) - out_u(clean),  mean over steps of  d metric / d in_v >

The gradient is that of the one receiver's own reading of the residual stream, through its norm and its matrix. Of each
step only what is as wide as the matrices' outputs is kept: gradients over the norm's scale add up before they are
brought to the stream, so the steps cost one forward and one backward pass each and little else. Heads that are not cut
out of one matrix cost one way back from the head to the stream each. Nothing as large as edges times positions is ever
made: the largest tensor is [sender, row, pos, d], of as many rows as a budget holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from cutaway.core.errors import UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Apply, Intervention, Set, Where
from cutaway.core.progress import track
from cutaway.ops.fronts import Front, Intake, Pull, final_intake
from cutaway.ops.pairs import Measure, Pairs, at_reads, read_logits, through_tail
from cutaway.ops.senders import Change, Senders, chunks
from cutaway.ops.watched import WatchedModel
from cutaway.ops.wiring import Wiring

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
        missing: how far what senders have in the last stream is from it; None where the stream itself is not normed.
    """

    scores: Tensor
    scale: Tensor
    clean: Tensor
    corrupt: Tensor
    embedding: float
    missing: float | None = None

    @property
    def error(self) -> float:
        """How far the edges out of the embedding are from its own gradient, relative to their size.

        The gradient at the embedding is the sum of those of all receivers, so this is 0 but for rounding. Where the
        stream itself is normed the embedding also acts through those norms' scales, which no receiver reads: there it
        is ``missing``.
        """
        if self.missing is not None:
            return self.missing
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
    means = total.scores / n, total.scale / n, total.clean, total.corrupt, total.embedding / n
    return EdgeScores(*means, total.missing)


def _together(total: EdgeScores, more: EdgeScores) -> EdgeScores:
    """The scores of two chunks, still sums over their pairs."""
    return EdgeScores(
        total.scores.add_(more.scores),
        total.scale.add_(more.scale),
        torch.cat([total.clean, more.clean]),
        torch.cat([total.corrupt, more.corrupt]),
        total.embedding + more.embedding,
        total.missing if more.missing is None else max(total.missing or 0.0, more.missing),
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
    embed = clean.outs[0].clone()
    change = Change(clean, replacement, pairs.clean.mask)
    del clean, replacement
    with torch.no_grad():
        clean_logits = read_logits(model, last, reads)
        measure = pairs.measure.against(clean_logits)
    total = _Sums(model, wiring, fronts, change)
    for point in points:
        total.step(pairs.clean, measure, embed + (1 - point) * change.now[0])
    scores, embedding = total.scores(len(points))
    with torch.no_grad():
        corrupt = measure.of(read_logits(model, last.float() + change.now.sum(0), reads))
    values = measure.of(clean_logits), corrupt
    return EdgeScores(scores, -total.lost / len(points), *values, embedding, change.missing(last))


@dataclass
class _Seen:
    """What one pass showed.

    Attributes:
        given, out: what matrices and norms took in and gave, by path. stream, mlp: the residual stream entering a
            layer, and what its MLP reads. heads: queries, keys or values that are not cut out of one matrix.
    """

    given: dict[str, Tensor] = field(default_factory=dict)
    out: dict[str, Tensor] = field(default_factory=dict)
    stream: dict[int, Tensor] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def keep(self, path: str) -> Any:
        """A hook that keeps a module's input and output."""

        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            self.given[path] = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
            self.out[path] = out

        return hook

    def aside(self, x: Tensor, where: Where) -> Tensor:
        """An intervention that changes nothing and keeps a stream, or heads, as a tensor of our own."""
        layer, kind = where.site.layer, where.site.kind
        own = x.view_as(x)
        if kind == "resid_pre":
            self.stream[layer] = own
        elif kind == "mlp.in":
            self.mlp[layer] = own
        else:
            self.heads[layer, kind[-1]] = own
        return own

    def pull(self, intake: Intake, n: Tensor) -> Pull:
        """The derivative of a norm in this pass, whose output was ``n``."""
        given = self.given[intake.path].detach() if intake.path else n.detach()
        return intake.pull(given.reshape(n.shape), n.detach())


class _Sums:
    """Gradients of all receivers, summed over steps; and what the norms' moving scales take off the scores."""

    def __init__(self, model: WatchedModel, wiring: Wiring, fronts: Sequence[Front], change: Change) -> None:
        self.model, self.wiring, self.fronts = model, wiring, fronts
        self.change, self.intake = change, final_intake(model)
        read_again = any(front.asked or front.gate or front.attention.norm or front.mlp.norm for front in fronts)
        if change.runs and (read_again or (self.intake is not None and self.intake.norm is not None)):
            found = "it norms the residual stream itself, and again what is read of it"
            raise UnsupportedError(f"the edges of {model.name}", found, "")
        self.flat = change.now.flatten(1, 2)  # [sender, token, d]
        self.matrix: dict[str, Tensor] = {}
        self.mlp: dict[int, Tensor] = {}
        self.bent: dict[int, Tensor] = {}  # of MLPs, what the moving scale takes off the gradient
        self.logits: Tensor | None = None
        self.embedding: Tensor | None = None
        self.found = torch.zeros(len(wiring.senders), len(wiring.receivers), device=change.now.device)
        self.lost = torch.zeros_like(self.found)

    def step(self, inputs: Inputs, measure: Measure, embed: Tensor) -> None:
        """Add the gradients of one run that starts from the residual stream ``embed`` [row, pos, d]."""
        seen, embed = _Seen(), embed.requires_grad_()
        states = self._run(inputs, embed, seen)
        reads = measure.reads(inputs)
        x = at_reads(states, reads)
        normed, logits = through_tail(self.model, x)
        value = measure.of(logits).sum()
        paths = list(dict.fromkeys(path for front in self.fronts for path in front.matrices))
        gates = {(i, "z"): seen.given[front.gate] for i, front in enumerate(self.fronts) if front.gate}
        heads = {**seen.heads, **gates}  # a gated head's gradient is that of what comes behind the gate
        at = [*(seen.out[path] for path in paths), *heads.values(), *seen.mlp.values(), normed, states, embed]
        found = torch.autograd.grad(value, at, allow_unused=True, retain_graph=bool(heads))
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(found, at, strict=True)]
        with torch.no_grad():
            self.logits = _sum(self.logits, grads[-2].float())
            self.embedding = _sum(self.embedding, grads[-1].float())
            self._final(
                x.detach().flatten(0, 1), normed.detach()[0], grads[-3][0].float(), at_reads(self.change.now, reads)
            )
            split = len(paths) + len(heads)
            by_path = dict(zip(paths, grads, strict=False))
            by_head = dict(zip(heads, grads[len(paths) : split], strict=True))
            by_layer = dict(zip(seen.mlp, grads[split:-3], strict=True))
            for i, front in enumerate(self.fronts):
                self._attention(i, front, seen, by_path, by_head)
                self._mlp(i, front, seen, by_layer[i].float())

    def _run(self, inputs: Inputs, embed: Tensor, seen: _Seen) -> Tensor:
        last = f"L{len(self.fronts) - 1}.resid_post"
        do: list[Intervention] = [Set("L0.resid_pre", embed)]
        with ExitStack() as exits:
            for i, front in enumerate(self.fronts):
                norms = [intake.path for intake in (front.attention, front.mlp) if intake.path]
                for path in dict.fromkeys([*front.matrices, *norms, *([front.gate] if front.gate else [])]):
                    module = self.model.hf.get_submodule(path)
                    exits.callback(module.register_forward_hook(seen.keep(path), with_kwargs=True).remove)
                kinds = [*(["resid_pre"] if not front.attention.path else []), *(f"attn.{x}" for x in front.asked)]
                kinds += ["attn.z"] if front.gate else []
                do += [Apply(f"L{i}.{kind}", seen.aside) for kind in [*kinds, *([] if front.at_norm else ["mlp.in"])]]
            trace = self.model.trace(inputs, want=last, do=do, grad=True, stop=True)
        for i, front in enumerate(self.fronts):
            if front.at_norm:
                seen.mlp[i] = seen.out[front.mlp.path]
        return trace[last]

    def _attention(
        self, i: int, front: Front, seen: _Seen, grads: dict[str, Tensor], by_head: dict[tuple[int, str], Tensor]
    ) -> None:
        read = seen.out[front.attention.path] if front.attention.path else seen.stream[i]
        pull, n = seen.pull(front.attention, read), self.wiring.first(i)
        for path in front.matrices:
            g = grads[path].float().reshape(*pull.inverse.shape, -1)
            self.matrix[path] = _sum(self.matrix.get(path), g * pull.inverse[..., None])
        moved = pull.moving(self.flat[:n])
        for name, side in front.sides.items():
            receivers = self.wiring.side(i, name)
            at = slice(receivers.start, receivers.stop)
            own = [] if side is not None else [_by_head(seen.heads[i, name], read, by_head[i, name])]
            if name == "q" and front.gate:
                own.append(_by_gate(seen.heads[i, "z"], seen.given[front.gate], read, by_head[i, "z"]))
            if own:
                pulled = front.attention.rows(sum(own[1:], own[0]).float()) * pull.inverse[..., None]
                self.found[:n, at] += self.change.now[:n].flatten(1) @ pulled.flatten(1).T
                if moved is not None and pull.x is not None:
                    self.lost[:n, at] += moved @ (pull.x * pulled).sum(-1).flatten(1).T
            if side is not None and moved is not None and front.attention.norm is not None:
                shift = front.attention.norm.shift[None].to(self.model.dtype)
                out = seen.out[side.path].detach().float() - self.model.hf.get_submodule(side.path)(shift)[0].float()
                product = (grads[side.path].float() * out).flatten(0, -2)
                along = product[:, side.columns.flatten()].unflatten(-1, tuple(side.columns.shape)).sum(-1)
                self.lost[:n, at] += moved @ along

    def _mlp(self, i: int, front: Front, seen: _Seen, g: Tensor) -> None:
        pull = seen.pull(front.mlp, seen.mlp[i])
        g = g.reshape(*pull.inverse.shape, -1)
        pulled = front.mlp.rows(g) * pull.inverse[..., None]
        self.mlp[i] = _sum(self.mlp.get(i), pulled)
        bent = pull.bent(pulled)  # of one receiver, so it adds up over steps as the gradient does
        if bent is not None:
            self.bent[i] = _sum(self.bent.get(i), bent)

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
        found = self.found - self.lost
        wide = self.change.now.flatten(1)  # [sender, token * d]; as the stream has it where the walk has come to
        direct = float((self.change.now[0] * self.embedding).sum()) if self.embedding is not None else 0.0
        for i, front in enumerate(self.fronts):
            n, mlp = self.wiring.first(i), self.wiring.block(i).stop
            for name, side in front.sides.items():
                if side is not None:
                    g = self.matrix[side.path].flatten(0, -2)[:, side.columns.flatten()]
                    rows = front.attention.rows(side.rows(self.model)[0])
                    by_head = g.unflatten(-1, tuple(side.columns.shape)).transpose(0, 1)
                    pulled = torch.bmm(by_head, rows)  # [head, token, d]
                    at = self.wiring.side(i, name)
                    found[:n, at.start : at.stop] += wide[:n] @ pulled.flatten(1).T
            self.change.past(i, "attn")
            reads = self.wiring.receivers[mlp].reads
            if i in self.bent:
                self.lost[:reads, mlp] = wide[:reads] @ self.bent[i].flatten()
                found[:reads, mlp] -= self.lost[:reads, mlp]
            found[:reads, mlp] += wide[:reads] @ self.mlp[i].flatten()
            self.change.past(i, "mlp")
        if self.logits is not None:
            found[:, -1] = wide @ self.logits.flatten()
        return found / steps, direct / steps


def _by_head(heads: Tensor, read: Tensor, g: Tensor) -> Tensor:
    """[head, *read] the gradient at ``read`` through each head alone, of that at all ``heads`` [row, pos, head, d]."""
    found = []
    for h in range(heads.shape[2]):
        one = torch.zeros_like(g)
        one[:, :, h] = g[:, :, h]
        back = None
        if heads.requires_grad:
            (back,) = torch.autograd.grad(heads, read, one, allow_unused=True, retain_graph=True)
        found.append(torch.zeros_like(read) if back is None else back)
    return torch.stack(found)


def _by_gate(z: Tensor, gated: Tensor, read: Tensor, g: Tensor) -> Tensor:
    """[head, *read] the gradient at ``read`` through each head's gate alone: of ``gated``, less that through ``z``."""
    found = []
    for h in range(z.shape[2]):
        one = torch.zeros_like(z)
        one[:, :, h] = g.reshape(z.shape)[:, :, h]
        at_z, whole = torch.autograd.grad(gated, [z, read], one.reshape(gated.shape), retain_graph=True)
        (attended,) = torch.autograd.grad(z, read, at_z, retain_graph=True)
        found.append(whole - attended)
    return torch.stack(found)


def _sum(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)
