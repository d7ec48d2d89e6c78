"""Run circuits: every receiver reads what its edges in the circuit bring it, and replacements for the rest.

    in_v  =  sum over edges of the circuit of out_u (as this very run has it)  +  sum over the other edges of the
             replacement of out_u (the corrupt run's, or a mean)

Many circuits are rows of one forward pass. The model's own modules run; what a layer's heads read one by one is put in
behind the matrix that makes their queries, keys and values. Heads that are not cut out of one matrix get what the layer
itself makes of what they read, called once for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Apply, Where
from cutaway.core.progress import track
from cutaway.ops.fronts import Front
from cutaway.ops.pairs import Pairs, read_logits
from cutaway.ops.senders import Renormed, Senders, Written, chunks
from cutaway.ops.watched import WatchedModel
from cutaway.ops.wiring import Wiring

BUDGET = 2**29
"""Bytes that the rows of one pass may take for what senders write and receivers read."""


class CircuitRuns:
    """Runs circuits of one model on pairs of prompts.

    Attributes:
        clean: [pair] the measure of the plain run. corrupt: [pair] that with everything replaced.
    """

    def __init__(
        self,
        model: WatchedModel,
        pairs: Pairs,
        wiring: Wiring,
        fronts: Sequence[Front],
        senders: Senders | None = None,
        budget: int = BUDGET,
    ) -> None:
        self.model, self.pairs, self.wiring, self.fronts, self.budget = model, pairs, wiring, fronts, budget
        self.senders = senders or Senders(model, wiring)
        whole = torch.as_tensor(wiring.real)
        self.clean, self.corrupt = self(torch.stack([whole, torch.zeros_like(whole)]))

    def last(self, inputs: Inputs) -> Tensor:
        """[row, pos, d] the last residual stream of a plain run."""
        site = f"L{len(self.fronts) - 1}.resid_post"
        return self.model.trace(inputs, want=site, stop=True)[site]

    def __call__(self, keep: Tensor) -> Tensor:
        """[circuit, pair] the measure when only these edges [circuit, sender, receiver] carry this very run."""
        d, tokens = self.model.layers[0].d_model, self.pairs.clean.ids.shape[1]
        width = len(self.wiring.senders) + 3 * max(len(self.wiring.block(i)) for i in range(len(self.fronts)))
        per_pair = 4 * width * tokens * d
        found = torch.empty(len(keep), len(self.pairs))
        together = not self.pairs.has_images
        for rows in track(chunks(len(self.pairs), per_pair, self.budget, together), "circuits"):
            some = self.pairs.take(rows)
            replacement = self.senders.replacement(some)
            for which in chunks(len(keep), per_pair * len(rows), self.budget, together):
                values = self._rows(some, replacement, keep[which.start : which.stop])
                found[which.start : which.stop, rows.start : rows.stop] = values.cpu()
        return found

    def _rows(self, pairs: Pairs, replacement: Written, keep: Tensor) -> Tensor:
        n = len(keep)
        repeated = pairs.take(list(range(len(pairs))) * n)
        one = _Pass(self, repeated.clean, replacement, keep)
        reads = repeated.measure.reads(repeated.clean)
        measure = repeated.measure
        if measure.metric is not None and measure.metric.form == "kl":
            clean = read_logits(self.model, self.last(repeated.clean), reads)
            measure = measure.against(clean)
        with torch.no_grad():
            return measure.of(read_logits(self.model, one.run(), reads)).view(n, len(pairs))


class _Pass:
    """One forward pass over circuits as rows: row ``c * pairs + b`` is circuit c on pair b."""

    def __init__(self, runs: CircuitRuns, inputs: Inputs, replacement: Written, keep: Tensor) -> None:
        self.model, self.wiring, self.fronts = runs.model, runs.wiring, runs.fronts
        self.senders, self.inputs = runs.senders, inputs
        device = replacement.outs.device
        self.circuits, self.pairs = len(keep), len(inputs) // len(keep)
        real = torch.as_tensor(self.wiring.real)
        self.left_out = (real & ~keep).to(device, torch.float32)  # [circuit, sender, receiver]
        self.written = replacement.copy()
        self.replacement = self.written.outs.expand(-1, self.pairs, inputs.ids.shape[1], -1)
        shape = (self.circuits, len(self.wiring.senders), self.pairs, inputs.ids.shape[1], self.replacement.shape[-1])
        self.gap = torch.zeros(shape, device=device)  # replacement less what this run has
        self.own = torch.zeros(shape[1], len(inputs), *shape[3:], device=device) if self.senders.norms else None
        self.total: Tensor | None = None
        self.z: Tensor | None = None
        self.spliced: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.made: dict[str, dict[int, Tensor]] = {}  # [row, pos, d] queries, keys or values of some heads, by side
        self.gates: list[tuple[int, Tensor]] = []  # (head, what its gate reads)
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def run(self) -> Tensor:
        """[row, pos, d] what the logits read."""
        last = f"L{len(self.fronts) - 1}.resid_post"
        do = [
            Apply("L*.resid_pre", self._enter),
            Apply("L*.attn.z", self._heads),
            Apply("L*.attn.out", self._attended),
            Apply("L*.mlp.out", self._wrote),
        ]
        with ExitStack() as exits:
            do += [
                Apply(f"L{i}.{'resid_mid' if part == 'attn' else 'resid_post'}", self._normed(part))
                for i, part in self.senders.norms
            ]
            for i, front in enumerate(self.fronts):
                if front.gate:
                    matrix = self.model.hf.get_submodule(front.gate)
                    exits.callback(matrix.register_forward_pre_hook(self._gate(i)).remove)
                if front.asked or front.gate:
                    layer = self.model.hf.get_submodule(self.model.layers[i].path)
                    exits.callback(layer.register_forward_pre_hook(self._called, with_kwargs=True).remove)
                    do += [Apply(f"L{i}.attn.{side}", self._put) for side in front.asked]
                for path in front.matrices:
                    module = self.model.hf.get_submodule(path)
                    exits.callback(module.register_forward_hook(self._splice(path)).remove)
                if front.at_norm:
                    module = self.model.hf.get_submodule(front.mlp.path)
                    exits.callback(module.register_forward_pre_hook(self._before_norm(i)).remove)
                else:
                    do.append(Apply(f"L{i}.mlp.in", self._mlp))
                    if not self.wiring.parallel[i]:
                        do.append(Apply(f"L{i}.resid_mid", self._middle))
            states = self.model.trace(self.inputs, want=last, do=do, stop=True)[last]
        return self._read(states, range(len(self.wiring.receivers) - 1, len(self.wiring.receivers)))[:, 0].flatten(0, 1)

    def _keep(self, first: int, outs: Tensor) -> None:
        """Note what senders from ``first`` on wrote, [sender, row, pos, d]."""
        rows = outs.float().unflatten(1, (self.circuits, self.pairs)).transpose(0, 1)
        end = first + len(outs)
        self.gap[:, first:end] = self.replacement[None, first:end] - rows
        if self.own is not None:
            self.own[first:end] = outs

    def _read(self, x: Tensor, receivers: range) -> Tensor:
        """[circuit, receiver, pair, pos, d] what each of these receivers reads where the stream is ``x``."""
        n = self.wiring.receivers[receivers.start].reads
        out = self.left_out[:, :n, receivers.start : receivers.stop]
        stream = x.float().unflatten(0, (self.circuits, 1, self.pairs))
        if not bool(out.any()):
            return stream.expand(-1, len(receivers), -1, -1, -1)
        moved = torch.bmm(out.transpose(1, 2), self.gap[:, :n].flatten(2))
        return moved.unflatten(2, self.gap.shape[2:]).add_(stream)

    # -- what happens at each place -----------------------------------------------------------------------------------
    def _called(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = args, kwargs

    def _enter(self, x: Tensor, where: Where) -> Tensor:
        i = where.site.layer
        if i == 0:
            self._keep(0, x[None])
        front, block = self.fronts[i], self.wiring.block(i)
        self.x = x
        self.spliced, self.made, self.gates = {}, {}, []
        if not bool(self.left_out[:, :, block.start : block.stop].any()):
            return x
        read = self._read(x, block).to(x.dtype)
        if front.matrices:
            normed = front.attention.run(self.model, read.flatten(0, 2)).float().view(read.shape)
        if front.gate:
            self.gates = self._apart(read, block, self.wiring.side(i, "q"))
        for name, side in front.sides.items():
            at = self.wiring.side(i, name)
            if side is None:
                self.made[name] = {
                    h: self.model.until_attention(i, *self.call, own)[name][:, :, h]
                    for h, own in self._apart(read, block, at)
                }
                continue
            rows, bias = side.rows(self.model)
            own = normed[:, at.start - block.start : at.stop - block.start].transpose(0, 1).flatten(1, 3)
            made = torch.bmm(own, rows.transpose(1, 2))  # [head, row * pos, c]
            made = made if bias is None else made + bias[:, None]
            self.spliced.setdefault(side.path, []).append((side.columns.flatten(), made.transpose(0, 1).flatten(1)))
        return x

    def _apart(self, read: Tensor, block: range, receivers: range) -> list[tuple[int, Tensor]]:
        """(head, [row, pos, d] what it reads) of those of the receivers that do not read the stream as it is."""
        out = self.left_out[:, :, receivers.start : receivers.stop].flatten(0, 1).any(0)
        first = receivers.start - block.start
        return [(h, read[:, first + h].flatten(0, 1)) for h in out.nonzero().flatten().tolist()]

    def _put(self, x: Tensor, where: Where) -> Tensor:
        return _with(x, self.made.get(where.site.kind[-1], {}))

    def _gate(self, i: int) -> Any:
        """A hook in front of the output matrix of gated heads: each gate has read what its head's query reads."""

        def hook(_: Any, given: tuple[Tensor, ...]) -> Any:
            if (z := self.z) is None:
                return None
            own = {h: self.model.behind_attention(i, *self.call, x, z)[:, :, h] for h, x in self.gates}
            self.z = _with(given[0].reshape(z.shape), own)
            return self.z.reshape(given[0].shape), *given[1:]

        return hook

    def _splice(self, path: str) -> Any:
        """A hook that puts what each head reads behind the matrix."""

        def hook(_: Any, __: Any, out: Tensor) -> Tensor | None:
            if path not in self.spliced:
                return None
            new = out.clone()
            flat = new.view(-1, new.shape[-1])
            for columns, made in self.spliced[path]:
                flat[:, columns] = made.to(new.dtype)
            return new

        return hook

    def _heads(self, z: Tensor, where: Where) -> Tensor:
        self.z = z
        return z

    def _attended(self, out: Tensor, where: Where) -> Tensor:
        i = where.site.layer
        if self.z is not None:
            self._keep(self.wiring.first(i), self.senders.writer(i, self.z, out)(self.z, out))
        self.total = self.x + out
        return out

    def _normed(self, part: str) -> Any:
        """An intervention that changes nothing: what senders have in the stream is carried past its norm."""

        def carried(x: Tensor, where: Where) -> Tensor:
            i = where.site.layer
            if self.own is not None and self.total is not None:
                n = self.senders.before(i, part)
                Renormed.of(n, self.senders.norms[i, part], self.total, x).carry(self.own)
                self.written.past(i, part)
                own = self.own[:n].unflatten(1, (self.circuits, self.pairs)).transpose(0, 1)
                self.gap[:, :n] = self.replacement[None, :n] - own
            self.x = x
            return x

        return carried

    def _middle(self, x: Tensor, where: Where) -> Tensor:
        self.x = x
        return x

    def _mlp(self, n: Tensor, where: Where) -> Tensor:
        i = where.site.layer
        receiver = self.wiring.block(i).stop
        if not bool(self.left_out[:, :, receiver].any()):
            return n
        read = self._read(self.x, range(receiver, receiver + 1))[:, 0].flatten(0, 1).to(n.dtype)
        return self.fronts[i].mlp.run(self.model, read).view(n.shape)

    def _before_norm(self, i: int) -> Any:
        """A hook that puts what the MLP reads in front of its norm."""

        def hook(_: Any, args: tuple[Any, ...]) -> Any:
            receiver = self.wiring.block(i).stop
            x = args[0].view(len(self.inputs), -1, args[0].shape[-1])
            read = self._read(x, range(receiver, receiver + 1))[:, 0].flatten(0, 1)
            return (read.to(args[0].dtype).view(args[0].shape), *args[1:])

        return hook

    def _wrote(self, out: Tensor, where: Where) -> Tensor:
        i = where.site.layer
        self._keep(self.wiring.first(i) + self.wiring.heads[i], out[None])
        self.total = self.x + out
        return out


def _with(x: Tensor, own: dict[int, Tensor]) -> Tensor:
    """``x`` [row, pos, head, d] with some heads replaced."""
    if not own:
        return x
    new = x.clone()
    for h, made in own.items():
        new[:, :, h] = made
    return new


def plain_values(runs: CircuitRuns) -> Tensor:
    """[2, pair] the measure of the clean run and of everything replaced, without running any circuit."""
    values = []
    with torch.no_grad():
        for b in range(len(runs.pairs)):
            one = runs.pairs.take([b])
            reads = one.measure.reads(one.clean)
            run, last = runs.senders.run(one.clean)
            clean = read_logits(runs.model, last, reads)
            if one.corrupt is None:
                last = last.float() + (runs.senders.replacement(one).outs - run.outs).sum(0)
            else:
                last = runs.last(one.corrupt)
            measure = one.measure.against(clean)
            values.append(torch.cat([measure.of(clean), measure.of(read_logits(runs.model, last, reads))]))
    return torch.stack(values, dim=1).cpu()
