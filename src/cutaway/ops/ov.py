"""Copying circuits: what a head would add to every token's logit if it looked at a token, through embedding, value,
output matrix and unembedding alone.

    C[s, t] = u_t . W_O n_out( W_V n_in(e_s) )          [token looked at, token raised]

Nothing of it is taken from matrices by name: the embeddings are put into every layer's input in one forward pass, and
the values that attention then has are read. Averages over both tokens are removed: what a head adds whatever it sees,
or adds to all tokens alike, copies nothing.

Source: Elhage et al. (2021), "A mathematical framework for transformer circuits"; there norms are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Set
from cutaway.ops.parts import take_apart
from cutaway.ops.readout import Head
from cutaway.ops.watched import WatchedModel

NOTHING = 1e-6  # of the largest circuit: what is smaller writes nothing


@dataclass(frozen=True)
class Circuits:
    """The copying circuits of one layer's heads, as two factors: ``C = seen @ raised``.

    Attributes:
        seen: [head, token, channel] values at the tokens, without their mean.
        raised: [head, channel, token] changes of logits, without their mean over tokens.
    """

    seen: Tensor
    raised: Tensor

    @property
    def size(self) -> Tensor:
        """[head] Frobenius norm of each circuit."""
        left, right = self.seen.mT @ self.seen, self.raised @ self.raised.mT
        return (left * right).sum((-2, -1)).clamp_min(0).sqrt()

    def eigenvalues(self) -> Tensor:
        """[head, channel] complex: those that are not zero, by way of the small product of the factors."""
        return torch.linalg.eigvals(self.raised @ self.seen)

    def trace(self) -> Tensor:
        """[head] sum of what each token does to itself."""
        return torch.einsum("htc,hct->h", self.seen, self.raised)

    def own_place(self) -> Tensor:
        """[head] mean place of a token among those that looking at it raises: 1 the first, 0 chance, -1 the last."""
        found = []
        for seen, raised in zip(self.seen, self.raised, strict=True):
            c = seen @ raised
            own = c.diagonal()[:, None]
            others = c.shape[0] - 1
            found.append((((c < own).sum() - (c > own).sum()) / (c.shape[0] * others)).float())
        return torch.stack(found)


def circuits(model: WatchedModel, inputs: Inputs, tokens: Inputs) -> tuple[dict[int, Circuits], dict[int, str]]:
    """The copying circuits of every layer, and why a layer has none.

    Args:
        inputs: a prompt whose last position gives the norms behind the output matrix their scales.
        tokens: the tokens, one per row: [token, 1].

    Raises:
        UnsupportedError: the layers do not add to the residual stream, or the readout is not understood.
    """
    parts = take_apart(model, inputs, 1, "head")
    ids = tokens.ids[:, 0].tolist()
    readout = Head(model).frozen(parts.final, parts.logits).only(ids)
    values = embedded_values(model, tokens, [group.layer for group in parts.groups])
    found = {}
    for group in parts.groups:
        rows = group.writer(group.rows.float()[:, None])
        raised = readout.project(rows)[:, 0].unflatten(0, (-1, group.channels))
        seen = values[group.layer].float().transpose(0, 1)
        seen = seen.repeat_interleave(raised.shape[0] // seen.shape[0], dim=0)
        found[group.layer] = Circuits(seen - seen.mean(1, keepdim=True), raised - raised.mean(-1, keepdim=True))
    return found, parts.missing


def embedded_values(model: WatchedModel, tokens: Inputs, layers: list[int]) -> dict[int, Tensor]:
    """[token, kv head, channel] the values of each layer if it read the embeddings of ``tokens`` [token, 1] alone."""
    embedding = model.trace(tokens, want="L0.resid_pre", stop=True)["L0.resid_pre"]
    do = [Set(f"L{i}.resid_pre", embedding) for i in layers]
    trace = model.trace(tokens, want=[f"L{i}.attn.v" for i in layers], do=do, stop=True)
    return {i: trace[f"L{i}.attn.v"][:, 0] for i in layers}
