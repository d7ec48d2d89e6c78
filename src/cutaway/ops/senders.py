"""What every sender writes into the residual stream in one run: the embedding, each head, each MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutaway.core.inputs import Inputs
from cutaway.ops.norms import Norm
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
    kinds = ("attn.z", "attn.out", "mlp.out")
    return ["L0.resid_pre", *(f"L{i}.{kind}" for i in range(n) for kind in kinds), f"L{n - 1}.resid_post"]


class Senders:
    """The outputs of every sender of a model, run by run.

    The writers are read from the first run and kept.

    Args:
        reference: runs over whose tokens means are taken, for pairs without corrupt prompts.
    """

    def __init__(self, model: WatchedModel, wiring: Wiring, reference: Inputs | None = None) -> None:
        self.model, self.wiring, self.reference = model, wiring, reference
        self.writers: dict[int, HeadWriter] = {}
        self._mean: Tensor | None = None

    def writer(self, layer: int, z: Tensor, out: Tensor) -> HeadWriter:
        """How a layer's heads write; read at first use from the run that is given."""
        if layer not in self.writers:
            self.writers[layer] = HeadWriter.of(self.model, layer, z, out)
        return self.writers[layer]

    def run(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """([sender, row, pos, d] float32, [row, pos, d] the last residual stream) of a run; 0 at padding."""
        trace = self.model.trace(inputs, want=wanted(self.model), stop=True)
        found = self.of({str(site): value for site, value in trace.items()})
        padding = ~inputs.mask.to(found.device, torch.bool)[None, :, :, None]
        n = len(self.model.layers)
        return found.masked_fill_(padding, 0.0), trace[f"L{n - 1}.resid_post"]

    def replacement(self, pairs: Pairs) -> Tensor:
        """[sender, row, pos, d], or with 1 for row and pos, what senders become when they are taken away."""
        if pairs.corrupt is not None:
            return self.run(pairs.corrupt)[0]
        if self._mean is None:
            reference = pairs.clean if self.reference is None else self.reference
            size = 4 * len(self.wiring.senders) * reference.ids.shape[1] * self.model.layers[0].d_model
            groups = chunks(len(reference), size, MEAN_BUDGET, at_once=not reference.has_images)
            total = sum(self.run(reference.take(rows))[0].sum((1, 2)) for rows in groups)
            self._mean = torch.as_tensor(total / int(reference.mask.sum()))[:, None, None]
        return self._mean

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
