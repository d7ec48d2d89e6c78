"""What every source position brings to the answer: read by the last position itself, or carried there by another.

With u_l the gradient of the score at the state that layer l reads at the last position t, head h of that layer brings

    direct(p)     = alpha_lh[t, p] <u_l, W_O^h v_l[p]>
    carried(q, p) = alpha_lh[t, q] <u_l, W_O^h W_V^h J_q a_jh'[q, p]>,  j < l

from position p: by itself, and through position q, where head h' of an earlier layer j had written
``a_jh'[q, p] = alpha_jh'[q, p] W_O^h' v_j[p]``. J_q is the norm in front of layer l's values, with its scale at q.
Attention weights and scales of norms stay what they were in the run; what MLPs at q make of it is left out.

Sources: Yu and Ananiadou (2024), "Understanding multimodal LLMs: the mechanistic interpretability of LLaVA in visual
question answering", for the direct part of one head; the second hop is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cutaway.core.errors import UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.site import Items
from cutaway.ops.importance import Baselines, Goal
from cutaway.ops.parts import Group, Parts, take_apart
from cutaway.ops.readers import value_reader
from cutaway.ops.readout import Head
from cutaway.ops.topk import BLOCK
from cutaway.ops.units import Unit
from cutaway.ops.watched import WatchedModel
from cutaway.ops.writers import rows_of, writer

KEPT = ("resid_pre", "attn.pattern", "attn.z", "attn.out")


@dataclass(frozen=True)
class Sources:
    """What source positions bring to a score, in its unit.

    Attributes:
        direct: [pos] by first order, summed over all heads of all layers.
        carried: [via, pos] by first order, summed over all pairs of heads. via: the positions it is carried through.
        exact: [pos] the increase that each head's vector from there makes by itself, summed over all heads; None when
            it was not asked for.
        head: the head that adds most. from_head: [pos] exact increases by its vectors.
        parts, goal: the run taken apart, and what is scored.
        error: largest relative gap found between the run and the sums and maps that these numbers rest on.
        missing: why a layer's heads, or what they carry on, could not be told, by layer.
    """

    direct: Tensor
    carried: Tensor
    via: tuple[int, ...]
    exact: Tensor | None
    head: Unit
    from_head: Tensor
    parts: Parts
    goal: Goal
    error: float
    missing: dict[int, str] = field(default_factory=dict)

    def brought(self, sources: Sequence[int], direct: Tensor | None = None) -> Tensor:
        """[source] what some positions bring, by themselves and through others."""
        own = self.direct if direct is None else direct
        return own[list(sources)] + self.carried[:, list(sources)].sum(0)

    def left(self, sources: Sequence[int]) -> Tensor:
        """[pos] what every position brings beside what it carries on from some of them; 0 at those."""
        rest = self.direct.clone()
        rest[list(self.via)] -= self.carried[:, list(sources)].sum(1)
        rest[list(sources)] = 0
        return rest


def sources(
    model: WatchedModel,
    inputs: Inputs,
    via: Sequence[int],
    target: int | None = None,
    rival: int | None = None,
    exact: bool = False,
) -> Sources:
    """What every position of one unpadded prompt brings to its last position's answer.

    Args:
        via: positions that may carry something on.
        target: the token scored; the model's own answer when it is not given. rival: score the logit difference.
        exact: also compute every head's exact increase from every position, which projects each to the vocabulary.

    Raises:
        UnsupportedError: no layer's heads can be told apart, or the readout is not understood.
    """
    at = f"@{Items.of(via)}"
    attending = [i for i, plan in enumerate(model.layers) if plan.has("attn.z") and plan.w_o] if via else []
    extra = [f"L{i}.{kind}{at}" for i in attending for kind in KEPT]
    parts = take_apart(model, inputs, 1, "head-position", extra)
    if not parts.groups:
        why = next(iter(parts.missing.values()), "no layer has heads")
        raise UnsupportedError(f"what heads of {model.name} bring from each position", why, "read attn.pattern instead")
    token = int(parts.logits[0].argmax()) if target is None else target
    goal = Goal.of(Head(model).frozen(parts.final, parts.logits), [token], rival)
    bases = Baselines(goal, torch.stack([parts.layers[g.layer].x for g in parts.groups]))
    first = [g.first_order(bases.gradient[n]).view(-1, g.per_source) for n, g in enumerate(parts.groups)]
    head, from_head = _best_head(bases, parts.groups)
    carried, errors, missing = (
        _carried(model, parts, bases, via, at) if via else (first[0].new_zeros(0, len(first[0])), [], {})
    )
    return Sources(
        direct=sum((f.sum(1) for f in first), torch.zeros(())),
        carried=carried,
        via=tuple(via),
        exact=_every_head(bases, parts.groups) if exact else None,
        head=head,
        from_head=from_head,
        parts=parts,
        goal=goal,
        error=max(parts.identity_error, *(g.writer.error for g in parts.groups), *errors),
        missing=parts.missing | missing,
    )


def _added(bases: Baselines, n: int, group: Group, index: Tensor) -> Tensor:
    """[i] exact increases by elements of a group, over baseline ``n``."""
    blocks = index.split(BLOCK)
    return torch.cat([bases.added(torch.full((len(b),), n), group.vectors(b)) for b in blocks])


def _best_head(bases: Baselines, groups: Sequence[Group]) -> tuple[Unit, Tensor]:
    """The head with the largest exact increase, and [pos] the increase by what it brings from each position."""
    whole = [replace(g, coef=g.coef.sum(1, keepdim=True), by_source=False) for g in groups]
    device = groups[0].coef.device
    found = [_added(bases, n, g, torch.arange(len(g), device=device)) for n, g in enumerate(whole)]
    n = max(range(len(found)), key=lambda i: float(found[i].max()))
    head = int(found[n].argmax())
    index = torch.arange(groups[n].coef.shape[1], device=device) * groups[n].per_source + head
    return whole[n].unit(head), _added(bases, n, groups[n], index)


def _every_head(bases: Baselines, groups: Sequence[Group]) -> Tensor:
    total = torch.zeros(groups[0].coef.shape[1], device=groups[0].coef.device)
    for n, g in enumerate(groups):
        total += _added(bases, n, g, torch.arange(len(g), device=total.device)).view(-1, g.per_source).sum(1)
    return total


def _carried(
    model: WatchedModel, parts: Parts, bases: Baselines, via: Sequence[int], at: str
) -> tuple[Tensor, list[float], dict[int, str]]:
    """[via, pos] what is carried on; the errors of the maps used; and the layers that could not be followed.

    From the last layer down, ``wanted`` [via, d] is what all later layers read at each position that carries, as a
    gradient: what a layer writes there counts as much as it has of it.
    """
    trace = parts.trace
    if trace is None:
        raise UnsupportedError(f"a run of {model.name}", "its activations were not kept", "")
    wanted = torch.zeros(len(via), parts.final.shape[-1], device=parts.final.device)
    total = torch.zeros(len(via), parts.groups[0].coef.shape[1], device=parts.final.device)
    errors, missing = [0.0], {}
    for n, group in reversed(list(enumerate(parts.groups))):
        layer = group.layer
        x, pattern, z, out = (trace[f"L{layer}.{kind}{at}"][0].float() for kind in KEPT)
        v = trace[f"L{layer}.attn.v"][0].float()
        heads, shared = z.shape[1], z.shape[1] // v.shape[1]
        rows, bias = rows_of(model, model.layers[layer].w_o)
        gate = parts.gates[layer][list(via)] if layer in parts.gates else None
        try:
            gated = z if gate is None else z * gate
            writes = writer(model, layer, "attn", gated.flatten(1) @ rows.float(), bias, out)
            reads = value_reader(model, layer, x, v[list(via)])
        except UnsupportedError as error:
            missing[layer] = error.found
            continue
        weighed = (writes.pull(wanted) @ rows.float().T).unflatten(-1, (heads, -1))
        weighed = weighed if gate is None else weighed * gate
        products = torch.einsum("qhc,phc->hqp", weighed, v.repeat_interleave(shared, dim=1))
        total += (pattern * products).sum(0)
        read = (group.writer.pull(bases.gradient[n]) @ group.rows.float().T)[0].unflatten(-1, (heads, -1))
        brought = trace[f"L{layer}.attn.pattern@-1"][0, :, 0, list(via)].float()
        values = torch.einsum("hq,hc->qhc", brought, read).unflatten(1, (-1, shared)).sum(2)
        wanted = wanted + reads.pull(values.flatten(1))
        errors += [writes.error, reads.error]
    return total, errors, missing
