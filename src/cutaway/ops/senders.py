"""What every sender writes into the residual stream in one run: the embedding, each head, each MLP.

Where a layer norms the sum of stream and part (BERT, the first GPT), what a sender has in the stream is carried on:
behind each norm it is what the norm, with the scale that it had in that run, makes of it. What is added whatever was
written, biases and shifts, counts as the embedding's, so that the senders add up to the stream at every place.

Source: Kobayashi et al. (2021), "Incorporating residual and normalization layers into analysis of masked language
models", for the norm of a sum as a sum of normed parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cutaway.core.errors import UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.ops.norms import Norm, measure
from cutaway.ops.pairs import Pairs
from cutaway.ops.watched import WatchedModel
from cutaway.ops.wiring import Wiring
from cutaway.ops.writers import rows_of, writer

MEAN_BUDGET = 2**28
"""Bytes that a part of the reference runs may take while means are taken."""


@dataclass(frozen=True)
class HeadWriter:
    """From a layer's z to what each head adds to the residual stream.

    Attributes:
        rows: [head, d_value, d] the output matrix by head. bias: [d]. factor: what its output is multiplied with.
        norm: the norm that the sum of all heads passes through; each head then with the scale of the sum.
    """

    rows: Tensor
    bias: Tensor | None
    factor: float
    norm: Norm | None

    @staticmethod
    def of(model: WatchedModel, layer: int, z: Tensor, out: Tensor) -> HeadWriter:
        """The writer that makes ``out`` [..., d] of ``z`` [..., head, d_value]; checked on them."""
        rows, bias = rows_of(model, model.layers[layer].w_o)
        total = (z.flatten(-2) @ rows).reshape(-1, rows.shape[1])
        found = writer(model, layer, "attn", total, bias, out.reshape(total.shape))
        norm = None if found.norm is None else found.norm.norm
        by_head = rows.float().unflatten(0, (z.shape[-2], z.shape[-1]))
        return HeadWriter(by_head, None if bias is None else bias.float(), found.factor, norm)

    def __call__(self, z: Tensor, out: Tensor) -> Tensor:
        """[head, ..., d] what each head adds, of z [..., head, d_value] and the sum ``out`` [..., d] that they made."""
        heads = z.shape[-2]
        flat = z.float().reshape(-1, heads, z.shape[-1]).transpose(0, 1)
        written = torch.bmm(flat, self.rows)
        if self.norm is None:
            written = written if self.factor == 1.0 else written * self.factor
        else:
            total = written.sum(0) if self.bias is None else written.sum(0) + self.bias
            inverse = self.norm.inverse_scale(total, out.float().reshape(total.shape))
            written = self.norm.gain * self.norm.centred(written) * inverse[:, None]
        return written.unflatten(1, tuple(z.shape[:-2]))


def wanted(model: WatchedModel) -> list[str]:
    """The sites that ``Senders`` reads in a run."""
    n = len(model.layers)
    found = ["L0.resid_pre"]
    for i, layer in enumerate(model.layers):
        states = ("resid_pre", "resid_mid", "resid_post") if layer.norms else ()
        found += [f"L{i}.{kind}" for kind in (*states, "attn.z", "attn.out", "mlp.out")]
    return [*found, f"L{n - 1}.resid_post"]


class Renormed(NamedTuple):
    """A norm of the whole stream in one run.

    Attributes:
        senders: how many have written before it. norm: what it does. before: [row, pos, d] the sum that it norms.
        inverse: [row, pos] 1 / its scale.
    """

    senders: int
    norm: Norm
    before: Tensor
    inverse: Tensor

    @staticmethod
    def of(senders: int, norm: Norm, before: Tensor, after: Tensor) -> Renormed:
        """The norm that made ``after`` of ``before``."""
        before = before.float()
        return Renormed(senders, norm, before, norm.inverse_scale(before, after.float()))

    def carry(self, outs: Tensor) -> None:
        """What senders have in the stream [sender, row, pos, d] becomes what they have behind the norm, in place."""
        own = outs[: self.senders]
        own[0] += self.before - own.sum(0)
        own.copy_(self.norm.gain * self.norm.centred(own) * self.inverse[..., None])
        own[0] += self.norm.shift


@dataclass
class Written:
    """What senders have in the stream in one run, at one place of it.

    Attributes:
        outs: [sender, row, pos, d] float32. norms: of the stream itself, still to come, by (layer, "attn" or "mlp").
    """

    outs: Tensor
    norms: dict[tuple[int, str], Renormed] = field(default_factory=dict)

    def copy(self) -> Written:
        """The same, to be carried on by itself."""
        return Written(self.outs.clone(), self.norms) if self.norms else self

    def past(self, layer: int, part: str) -> None:
        """Go on to behind the norm of a layer's ``part``, if the stream is normed there."""
        if (layer, part) in self.norms:
            self.norms[layer, part].carry(self.outs)


class Change:
    """How what senders have in the stream differs between a run and one that replaces it, place by place.

    What the run wrote is written over.

    Attributes:
        now: [sender, row, pos, d] at the place reached; 0 at padding.
    """

    def __init__(self, run: Written, other: Written, mask: Tensor) -> None:
        self.padding = ~mask.to(run.outs.device, torch.bool)[None, :, :, None]
        self.runs = (run, other) if run.norms else ()
        self.now = run.outs.clone() if run.norms else run.outs  # in place: it is the largest tensor there is
        self.now.neg_().add_(other.outs).masked_fill_(self.padding, 0.0)

    def missing(self, last: Tensor) -> float | None:
        """How far what senders have is from the last residual stream, relative; None where no norm was passed."""
        if not self.runs:
            return None
        gap = (self.runs[0].outs.sum(0) - last.float()).masked_fill_(self.padding[0], 0.0)
        return float(gap.abs().max()) / (float(last.abs().max()) or 1.0)

    def past(self, layer: int, part: str) -> None:
        """Go on to behind the norm of a layer's ``part``, if the stream is normed there."""
        if self.runs and (layer, part) in self.runs[0].norms:
            for run in self.runs:
                run.past(layer, part)
            self.now.copy_(self.runs[1].outs).sub_(self.runs[0].outs).masked_fill_(self.padding, 0.0)


class Senders:
    """The outputs of every sender of a model, run by run.

    The writers are read from the first run and kept.

    Args:
        reference: runs over whose tokens means are taken, for pairs without corrupt prompts.
    """

    def __init__(self, model: WatchedModel, wiring: Wiring, reference: Inputs | None = None) -> None:
        self.model, self.wiring, self.reference = model, wiring, reference
        self.writers: dict[int, HeadWriter] = {}
        self.norms = {
            (i, part): measure(
                model.hf.get_submodule(path),
                layer.d_model,
                model.device,
                model.dtype,
                f"the norm {path} of {model.name}",
            )
            for i, layer in enumerate(model.layers)
            for part, path in layer.norms.items()
        }
        self._mean: Tensor | None = None

    def writer(self, layer: int, z: Tensor, out: Tensor) -> HeadWriter:
        """How a layer's heads write; read at first use from the run that is given."""
        if layer not in self.writers:
            self.writers[layer] = HeadWriter.of(self.model, layer, z, out)
        return self.writers[layer]

    def run(self, inputs: Inputs) -> tuple[Written, Tensor]:
        """(what a run writes, 0 at padding; [row, pos, d] its last residual stream)."""
        gated: dict[str, Tensor] = {}

        def keep(i: int) -> Any:
            def hook(_: Any, given: tuple[Tensor, ...]) -> None:
                gated[f"L{i}.attn.z"] = given[0]

            return hook

        with ExitStack() as exits:
            for i, layer in enumerate(self.model.layers):
                if layer.gated:
                    module = self.model.hf.get_submodule(layer.w_o)
                    exits.callback(module.register_forward_pre_hook(keep(i)).remove)
            trace = self.model.trace(inputs, want=wanted(self.model), stop=True)
        values = {str(site): value for site, value in trace.items()}
        values |= {site: given.detach().reshape(values[site].shape) for site, given in gated.items()}
        padding = ~inputs.mask.to(self.model.device, torch.bool)[None, :, :, None]
        norms = {place: self._renormed(values, *place) for place in self.norms}
        last: Tensor = values[f"L{len(self.model.layers) - 1}.resid_post"]
        return Written(self.of(values).masked_fill_(padding, 0.0), norms), last

    def _renormed(self, values: Mapping[str, Any], i: int, part: str) -> Renormed:
        before, after = ("resid_pre", "resid_mid") if part == "attn" else ("resid_mid", "resid_post")
        total = values[f"L{i}.{before}"] + values[f"L{i}.{part}.out"]
        return Renormed.of(self.before(i, part), self.norms[i, part], total, values[f"L{i}.{after}"])

    def before(self, layer: int, part: str) -> int:
        """How many senders have written when a layer has added its ``part``."""
        return self.wiring.first(layer) + self.wiring.heads[layer] + (part == "mlp")

    def replacement(self, pairs: Pairs) -> Written:
        """[sender, row, pos, d], or with 1 for row and pos, what senders become when they are taken away.

        Raises:
            UnsupportedError: means, where the stream itself is normed.
        """
        if pairs.corrupt is not None:
            return self.run(pairs.corrupt)[0]
        if self.norms:
            found = "its layers norm the sum of stream and part, and a mean has no scale of its own"
            raise UnsupportedError(f"means in place of what parts of {self.model.name} write", found, "give 'corrupt'")
        if self._mean is None:
            reference = pairs.clean if self.reference is None else self.reference
            size = 4 * len(self.wiring.senders) * reference.ids.shape[1] * self.model.layers[0].d_model
            groups = chunks(len(reference), size, MEAN_BUDGET, at_once=not reference.has_images)
            total = sum(self.run(reference.take(rows))[0].outs.sum((1, 2)) for rows in groups)
            self._mean = torch.as_tensor(total / int(reference.mask.sum()))[:, None, None]
        return Written(self._mean)

    def of(self, values: Mapping[str, Any]) -> Tensor:
        """[sender, row, pos, d] of the activations of a run, by site."""
        embed = values["L0.resid_pre"]
        found = torch.empty(len(self.wiring.senders), *embed.shape, device=embed.device)
        found[0] = embed
        for i, heads in enumerate(self.wiring.heads):
            at = self.wiring.first(i)
            z, out = values[f"L{i}.attn.z"], values[f"L{i}.attn.out"]
            found[at : at + heads] = self.writer(i, z, out)(z, out)
            found[at + heads] = values[f"L{i}.mlp.out"]
        return found


def chunks(rows: int, bytes_per_row: int, budget: int, at_once: bool = True) -> list[range]:
    """Consecutive rows, as many together as the budget holds; one by one unless ``at_once``."""
    size = max(1, budget // max(bytes_per_row, 1)) if at_once else 1
    return [range(i, min(i + size, rows)) for i in range(0, rows, size)]
