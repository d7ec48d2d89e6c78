"""Neuron sources: what a head picked up, and where, that switched an FFN neuron on."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import annotated_types
import torch
from torch import Tensor

from cutaway.core.errors import ParameterError, UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Zero
from cutaway.core.method import method
from cutaway.core.params import Count, Image, Prompt, Sites
from cutaway.core.proof import Check, Proof
from cutaway.models.handle import Model
from cutaway.ops.draws import Draws, proof_of, sizes, worthwhile
from cutaway.ops.parts import Parts, take_apart, unpadded
from cutaway.ops.readout import FrozenReadout, Head
from cutaway.ops.subkeys import ValueNeurons, read_values, totals
from cutaway.ops.transport import transports
from cutaway.ops.units import EMBED, Unit
from cutaway.ops.watched import rounding
from cutaway.results.ranking import Ranking

LevelName = Literal["layer", "head", "neuron"]
WORDS = {"layer": "sublayers", "head": "heads", "neuron": "FFN neurons"}
NEURONS = ("mlp.act", "expert.act")


@method(
    cites="yu2024arithmetic",
    example={"prompt": "#5 #9 #6 #7", "neuron": "L2.mlp.act[6]", "head": "L1.attn.z[0]", "k": 4, "draws": 0},
)
def neuron_sources(
    model: Model,
    prompt: Prompt,
    neuron: Sites,
    head: Sites | None = None,
    image: Image | None = None,
    level: LevelName = "neuron",
    k: Count = 30,
    tokens: Count = 5,
    draws: Annotated[int, annotated_types.Ge(0)] = 5,
    seed: int = 0,
) -> Ranking:
    """What a head picked up at each earlier position that switched an FFN neuron on, in units of its activation.

    The neuron is read at the last position. What the head brought to its activation is a sum over positions, and at
    each of them over all that was added to the stream there, by the attention weights and norms of the run. Shallow
    neurons that say nothing readable by themselves may say it behind the head: both lists of tokens are given. The
    proof zeroes the first, each at its position, and reads what the activation loses.

    Source: Yu and Ananiadou (2024), "Interpreting arithmetic mechanism in large language models through comparative
    neuron analysis", section 5: feature enhancing.

    Args:
        prompt: text or token ids.
        neuron: one neuron (mlp.act, expert.act), e.g. a root that ``neuron_chain`` names.
        head: one head (attn.z); the one that brings most to the neuron when it is not given.
        image: an image that goes with the prompt.
        level: what is ranked: the embedding and sublayers, heads, or FFN neurons, each at each position.
        k: how many are shown.
        tokens: how many tokens each list has.
        draws: random draws of the proof, at least 5; 0 leaves it out.
        seed: of the draws.

    Returns:
        the k parts that brought most, by place and position; positive works towards what the activation is. ``share``
        is that of the activation, ``of the head`` that of what the head brought; ``raises`` the tokens that the part's
        vector raises where it was added, ``behind the head`` those that the head made of it.

    Raises:
        ParameterError: not one neuron that is on, or not one head that it can read. UnsupportedError: they are not
        understood, or nothing of that level lies before the head.
    """
    batch = unpadded(model.inputs(prompt, image))
    unit = _one(model, batch, neuron, "neuron", NEURONS)
    root = read_values(model, batch, [unit], torch.ones(1, device=model.device))
    if not root.units:
        raise UnsupportedError(f"what switches {unit} of {model.name} on", "; ".join(root.missing.values()), "")
    if float(root.coefficients[0]) == 0.0:
        raise ParameterError("parameter 'neuron'", f"{unit} is off at the last position", "name one that is on")
    mover = _costliest(model, batch, root, level) if head is None else _one(model, batch, head, "head", ("attn.z",))
    if not root.reads[0].sees("attn.z", mover.layer):
        raise ParameterError("parameter 'head'", f"{unit} does not read what {mover} adds", "name a head before it")
    ways, missing, last = transports(model, batch, [mover])
    if missing:
        raise UnsupportedError(f"what {mover} of {model.name} brings", missing[mover], "")
    way, key, m = ways[mover], root.reads[0].keys.vectors[0], float(root.coefficients[0])
    origin = way.brought(key).signed(-1.0 if m < 0 else 1.0)
    parts = take_apart(model, batch, range(len(origin.units)), level)
    found = _best(parts, origin, mover.layer, k, level)
    whole = float(origin.scores.sum())
    sums = totals(parts, origin)
    seen = way.written() @ key
    gap = float((seen - origin.coefficients).abs().sum() / seen.abs().sum().clamp_min(torch.finfo(seen.dtype).tiny))
    scores = torch.tensor([each.score for each in found])
    readout = Head(model).frozen(last.final, last.logits)
    own = torch.stack([each.vector for each in found])
    behind = torch.cat([way.carried(each.vector[None], each.position) for each in found])
    proof, notes = _proof(model, batch, unit, found, draws, seed)
    by_position = zip(batch.tokens[0], origin.scores.tolist(), strict=True)
    return Ranking(
        title=f"{WORDS[level]} of {model.name} whose writing {mover} brings to {unit}",
        items=[each.text for each in found],
        scores=scores,
        columns={
            "layer": [each.layer for each in found],
            "position": [each.position for each in found],
            "token": [batch.tokens[0][each.position] for each in found],
            "attention": way.pattern[mover.number][[each.position for each in found]].cpu(),
            "share": scores / (abs(m) or 1.0),
            "of the head": scores / (whole or 1.0),
            "raises": _raised(model, readout, own, tokens),
            "behind the head": _raised(model, readout, behind, tokens),
        },
        measure="activation brought",
        order="given",
        check=Check(
            name="parts and constants sum to what the head brought from each position",
            value=max(sums.error, gap, way.error, parts.identity_error, *(g.writer.error for g in parts.groups), 0.0),
            tolerance=rounding(model.dtype),
        ),
        proof=proof,
        notes=(
            f"{mover} brings {whole:.4g} of the activation {abs(m):.4g}: "
            + ", ".join(f"{token.strip()!r} {value:.4g}" for token, value in by_position),
            "of that: " + ", ".join(f"{name} {value:.4g}" for name, value in sums.shared.items()),
            *([f"the activation is {m:.4g}; positive scores make it more negative"] if m < 0 else []),
            *notes,
        ),
    )


class _Found(NamedTuple):
    """A part at a position: its place (None for the embedding), what it brought, and [d] what it added there."""

    unit: Unit | None
    layer: int
    position: int
    score: float
    vector: Tensor

    @property
    def text(self) -> str:
        return f"{EMBED}@{self.position}" if self.unit is None else str(self.unit)


def _one(model: Model, batch: Inputs, sites: Any, name: str, kinds: tuple[str, ...]) -> Unit:
    units = [u for site in model.expand(sites, batch) for u in Unit.of_site(site, model.anatomy(batch))]
    if len(units) != 1 or units[0].kind not in kinds:
        named = f"{', '.join(map(str, units[:3])) or 'none'}{', ...' if len(units) > 3 else ''}"
        raise ParameterError(f"parameter {name!r}", f"it names {named}", f"name one {name} ({' or '.join(kinds)})")
    return units[0]


def _costliest(model: Model, batch: Inputs, root: ValueNeurons, level: str) -> Unit:
    """The head that brings most to the neuron, of those with something of that level before them."""
    best: tuple[float, Unit] | None = None
    sign = float(root.coefficients[0].sign()) or 1.0
    for group in take_apart(model, batch, 1, "head").groups:
        if group.layer == 0 and level != "layer":
            continue
        brought = root.contributions(group.kind, group.layer, group.vectors(torch.arange(len(group))))[:, 0] * sign
        score, h = brought.max(0)
        if root.reads[0].sees(group.kind, group.layer) and (best is None or float(score) > best[0]):
            best = float(score), group.unit(int(h))
    if best is None:
        raise UnsupportedError(f"heads of {model.name}", f"none is read by {root.units[0]}", "name a deeper neuron")
    return best[1]


def _best(parts: Parts, origin: ValueNeurons, layer: int, k: int, level: str) -> list[_Found]:
    """The k largest of all parts at all positions."""
    if level == "layer":
        rows: list[tuple[Unit | None, int, Tensor]] = [(None, -1, parts.layers[0].x)]
        for i, each in enumerate(parts.layers[:layer]):
            for kind, part in (("attn.out", each.attn), ("mlp.out", each.mlp)):
                rows += [] if part is None else [(Unit(kind, i), i, part)]
        scores = [(origin.gradient("embed", i) * part).sum(-1)[:, None] for _, i, part in rows]
    else:
        groups = [group for group in parts.groups if group.layer < layer]
        scores = [group.by_position(origin.gradient(group.kind, group.layer)) for group in groups]
    if not scores:
        why = next(iter(parts.missing.values()), f"no layer before layer {layer} has them")
        raise UnsupportedError(f"{WORDS[level]} behind the head", why, "choose level='layer'")
    flat = torch.cat([some.flatten() for some in scores])
    ends = torch.tensor([some.numel() for some in scores]).cumsum(0)
    found = []
    for i in _largest(flat, k):
        g = int(torch.searchsorted(ends, i, right=True))
        n = scores[g].shape[1]
        position, element = divmod(i - int(ends[g]) + scores[g].numel(), n)
        if level == "layer":
            unit, where, part = rows[g]
            vector = part[position]
        else:
            unit, where = groups[g].unit(element), groups[g].layer
            vector = groups[g].vectors(torch.tensor([element], device=flat.device))[0, position]
        placed = None if unit is None else unit._replace(at=position)
        found.append(_Found(placed, where, position, float(flat[i]), vector))
    return found


def _largest(scores: Tensor, k: int) -> list[int]:
    """Places of the k largest; zeros, which nothing reads, are left out where there is anything else."""
    best = scores.topk(min(k, len(scores))).indices.tolist()
    return [i for i in best if float(scores[i]) != 0.0] or best[:1]


def _raised(model: Model, readout: FrozenReadout, vectors: Tensor, n: int) -> list[str]:
    """The tokens that vectors raise most, of those that they raise by more than rounding."""
    change = readout.project(vectors[:, None])[:, 0]
    floors = readout.floor(vectors[:, None])[:, 0]
    best = change.topk(min(n, change.shape[-1]))
    return [
        " ".join(model.decode(int(i)).strip() for i, value in zip(ids, values, strict=True) if value > floor)
        for ids, values, floor in zip(best.indices, best.values, floors, strict=True)
    ]


def _proof(
    model: Model, batch: Inputs, unit: Unit, found: list[_Found], n_draws: int, seed: int
) -> tuple[Proof | None, list[str]]:
    """The share of the activation that goes when the first are zeroed where they are, against random ones there."""
    if n_draws == 0:
        return None, ["no proof was asked for"]
    named = [(each.unit, each.score) for each in found if each.unit is not None]
    best = worthwhile([u for u, _ in named], [score for _, score in named])
    drawer = Draws(model, best, batch.ids.shape[1], seed)
    if drawer.most == 0:
        return None, ["no proof: nothing works towards the activation, or there are too few others to compare with"]
    ks = sizes(drawer.most)
    sets = drawer.sets(ks, n_draws)
    before, *after = (_activation(model, batch, unit, some) for some in ([], *sets))
    lost = torch.tensor([(before - each) / (before or 1.0) for each in after], dtype=torch.float64)
    measures = (f"the activation of {unit}", "of it")
    matched = f"{drawer.matched.replace(' and ', ', ')} and position"
    n = len(ks)
    return proof_of(
        lost[:n], lost[n:].view(n_draws, n), ks, "zeroing the first parts", matched, measures, drawer.distinct
    ), []


def _activation(model: Model, batch: Inputs, unit: Unit, without: list[Unit]) -> float:
    """What multiplies the neuron's column at the last position while others are zeroed."""
    do = [Zero(str(each)) for each in without]
    site = f"L{unit.layer}.{unit.kind}@-1"
    if unit.kind == "mlp.act":
        return float(model.trace(batch, want=site, do=do, stop=True)[site][0, 0, unit.number])
    gate = f"L{unit.layer}.expert.gate@-1"
    trace = model.trace(batch, want=[site, gate], do=do, stop=True)
    return float(trace[gate][0, 0, unit.number] * trace[site][0, 0, unit.number, unit.inner])
