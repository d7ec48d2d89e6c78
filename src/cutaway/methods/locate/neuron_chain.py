"""Neuron chain: which of some FFN neurons, and which heads from where, switched the deeper ones on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cutaway.core.errors import ParameterError, UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Zero
from cutaway.core.method import method
from cutaway.core.params import Count, DrawCount, Image, Prompt, Sites
from cutaway.core.proof import Check, Proof
from cutaway.models.handle import Model
from cutaway.ops.draws import UNASKED, Draws, sizes
from cutaway.ops.parts import Group, Parts, take_apart, unpadded
from cutaway.ops.subkeys import read_values, totals
from cutaway.ops.units import Unit
from cutaway.ops.watched import rounding
from cutaway.results.graph import Graph
from cutaway.results.ranking import Ranking

NEURONS = ("mlp.act", "expert.act")


@method(
    cites="yu2024arithmetic",
    example={"prompt": "#5 #9 #6 #7", "sites": "L0.mlp.act[0-3], L1.mlp.act[0-3], L2.mlp.act[0-3]", "draws": 0},
)
def neuron_chain(
    model: Model,
    prompt: Prompt,
    ranking: Ranking | None = None,
    sites: Sites | None = None,
    heads: Sites | None = None,
    image: Image | None = None,
    most: Count = 30,
    k: Count = 3,
    draws: DrawCount = 5,
    seed: int = 0,
) -> Graph:
    """How much of each neuron's activation every shallower one of them brought, and what heads brought it from where.

    An activation is shared out among all that was added to the stream before its layer, by the neuron's sub-keys under
    the run's own norm; an edge is the share of one neuron's vector, or of what a head brought from one position. The
    lowest neurons are the roots of the chain. The proof zeroes those that bring most, and reads what the activations of
    the others lose, against random neurons of the same layers.

    Source: Yu and Ananiadou (2024), "Interpreting arithmetic mechanism in large language models through comparative
    neuron analysis", section 5: prediction enhancing, and the first step of feature enhancing.

    Args:
        prompt: text or token ids.
        ranking: FFN neurons, as ``compare_neurons`` or ``neuron_attribution`` name them.
        sites: neurons (mlp.act, expert.act), instead of a ranking.
        heads: heads (attn.z) that are split over the positions they bring from; without them edges are between neurons.
        image: an image that goes with the prompt.
        most: how many neurons are used, from the first on.
        k: how many roots the proof takes away at most.
        draws: random draws of the proof, at least 5; 0 leaves it out.
        seed: of the draws.

    Returns:
        a graph of neurons, and heads by position; ``weight`` is what was brought to the activation that an edge ends
        in, negative where it works against it, and ``share`` how much of it that is.

    Raises:
        ParameterError: neither or both of ranking and sites, no neurons of two layers, or ``heads`` that are no heads.
        UnsupportedError: layers that do not add to the residual stream.
    """
    if (ranking is None) == (sites is None):
        found = "neither is given" if ranking is None else "both are given"
        raise ParameterError("parameters 'ranking' and 'sites'", found, "give one of them")
    batch = unpadded(model.inputs(prompt, image))
    units = _units(model, batch, ranking, sites, most, heads is not None)
    movers = _units(model, batch, None, heads, most) if heads is not None else []
    if any(unit.kind != "attn.z" or unit.inner >= 0 for unit in movers):
        raise ParameterError("parameter 'heads'", f"{', '.join(map(str, movers))} are named", "name heads: attn.z")
    values = read_values(model, batch, units, torch.ones(len(units), device=model.device))
    if not values.units:
        why = "; ".join(values.left_out).replace("value neurons of ", "") or "none is named"
        raise UnsupportedError(f"what switches neurons of {model.name} on", why, "")
    parts = take_apart(model, batch, 1, "neuron")
    writers = _neurons(parts, units) + (_moved(model, batch, movers) if movers else [])
    brought = torch.stack([values.contributions(w.unit.kind, w.unit.layer, w.vector[None])[0] for w in writers])
    shares = _over(brought, values.coefficients).cpu()
    weights = (brought * values.coefficients.sign()).cpu()
    whole = float(values.coefficients.abs().sum()) or 1.0
    names = [str(writer.unit) for writer in writers]
    read = [names.index(str(unit)) for unit in values.units]
    source, target = (weights != 0).nonzero().T.tolist()
    order = _roots(writers, weights, read)
    proof, notes = _proof(model, batch, units, [writers[n].unit for n in order[:k]], draws, seed)
    coefficients = {str(unit): float(m) for unit, m in zip(values.units, values.coefficients, strict=True)}
    return Graph(
        title=f"neurons of {model.name} that switch each other on",
        nodes=names,
        source=source,
        target=[read[n] for n in target],
        weight=weights[source, target],
        layer=torch.tensor([2.0 * w.unit.layer + (w.unit.kind != "attn.z") for w in writers]),
        node_columns={
            "kind": ["head" if w.unit.kind == "attn.z" else "neuron" for w in writers],
            "coefficient": torch.tensor([coefficients.get(name, float("nan")) for name in names]),
            "brings": weights.sum(1) / whole,
        },
        edge_columns={"share": shares[source, target]},
        measure="activation brought",
        check=Check(
            name="parts and constants sum to the activations",
            value=max(totals(take_apart(model, batch, values.positions, "layer"), values).error, parts.identity_error),
            tolerance=rounding(model.dtype),
        ),
        proof=proof,
        notes=(
            "roots, by the share of all activations that they bring: "
            + (", ".join(f"{names[n]} {float(weights[n].sum()) / whole:.3g}" for n in order[:5]) or "none"),
            f"all that is named brings {float(weights.sum()) / whole:.3g} of all activations",
            *values.left_out,
            *notes,
        ),
    )


class _Writer(NamedTuple):
    """A neuron or a head from one position, and [1, d] what it added at the last position."""

    unit: Unit
    vector: Tensor


def _units(
    model: Model, inputs: Inputs, ranking: Ranking | None, sites: Any, most: int, split: bool = False
) -> list[Unit]:
    """The neurons named, of two layers unless heads are split too; or the heads."""
    if ranking is not None:
        units = [Unit.parse(item) for item in ranking.items[:most]]
    else:
        found = model.expand(sites or (), inputs)
        units = [u for site in found for u in Unit.of_site(site, model.anatomy(inputs))][:most]
        if units and units[0].kind == "attn.z":
            return list(dict.fromkeys(units))
    layers = {unit.layer for unit in units}
    if any(unit.kind not in NEURONS for unit in units) or len(layers) < (1 if split else 2):
        found_ = f"{', '.join(map(str, units[:3])) or 'none'}{', ...' if len(units) > 3 else ''} are named"
        raise ParameterError("neurons of a chain", found_, "name FFN neurons of two layers or more, or heads too")
    return list(dict.fromkeys(units))


def _neurons(parts: Parts, units: list[Unit]) -> list[_Writer]:
    """What each neuron added at the last position; an expert that was not routed to added nothing."""
    groups = {(g.layer, g.expert): g for g in parts.groups}
    found = []
    for unit in units:
        group = groups.get((unit.layer, unit.number if unit.kind == "expert.act" else -1))
        found.append(_Writer(unit, torch.zeros_like(parts.final) if group is None else _vector(group, unit)))
    return found


def _moved(model: Model, inputs: Inputs, heads: list[Unit]) -> list[_Writer]:
    """What each head brought from every position."""
    parts = take_apart(model, inputs, 1, "head-position")
    groups = {g.layer: g for g in parts.groups}
    places = range(inputs.ids.shape[1])
    split = [head._replace(source=s) for head in heads if head.layer in groups for s in places]
    return [_Writer(unit, _vector(groups[unit.layer], unit)) for unit in split]


def _vector(group: Group, unit: Unit) -> Tensor:
    return group.vectors(torch.tensor([group.element(unit)], device=group.rows.device))[0]


def _over(brought: Tensor, coefficients: Tensor) -> Tensor:
    return torch.where(coefficients == 0, torch.zeros_like(brought), brought / coefficients)


def _roots(writers: list[_Writer], weights: Tensor, read: list[int]) -> list[int]:
    """Neurons that bring something to others, most first."""
    given = weights.sum(1)
    found = [n for n in read if writers[n].unit.kind in NEURONS and float(given[n]) > 0]
    return sorted(found, key=lambda n: -float(given[n]))


def _proof(
    model: Model, inputs: Inputs, units: list[Unit], roots: list[Unit], n_draws: int, seed: int
) -> tuple[Proof | None, list[str]]:
    """The share of the other neurons' activations that goes when the roots are zeroed, against random ones."""
    if n_draws == 0:
        return None, [UNASKED]
    others = [unit for unit in units if unit not in roots]
    drawer = Draws(model, roots, inputs.ids.shape[1], seed)
    if drawer.most == 0 or not others:
        return None, ["no proof: no neuron brings anything to another, or there are too few others"]
    ks = sizes(drawer.most)
    sets = drawer.sets(ks, n_draws)
    before = _activations(model, inputs, others, ())
    lost = []
    for some in sets:
        after = _activations(model, inputs, others, some)
        lost.append(float(((before - after) * before.sign()).sum() / before.abs().sum()))
    effect = torch.tensor(lost, dtype=torch.float64)
    return (
        Proof(
            ablated="zeroing the neurons that bring most",
            ks=tuple(ks),
            effect=effect[: len(ks)].numpy(),
            random=effect[len(ks) :].view(n_draws, len(ks)).numpy(),
            metric="the other neurons' activations",
            unit="of their size",
            matched=drawer.matched,
            distinct=drawer.distinct,
        ),
        [],
    )


def _activations(model: Model, inputs: Inputs, units: list[Unit], without: Sequence[Unit]) -> Tensor:
    """[n] coefficients of neurons when others are zeroed."""
    with model.doing([Zero(str(unit)) for unit in without]):
        parts = take_apart(model, inputs, 1, "neuron")
    groups = {(g.layer, g.expert): g for g in parts.groups}
    found = []
    for unit in units:
        group = groups.get((unit.layer, unit.number if unit.kind == "expert.act" else -1))
        found.append(0.0 if group is None else group.coefficient(group.element(unit)))
    return torch.tensor(found, dtype=torch.float64)
