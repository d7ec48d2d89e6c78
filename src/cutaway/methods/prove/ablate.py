"""Ablation: what the answer loses without the components that were named, against random ones."""

from __future__ import annotations

from typing import Annotated, Literal

import annotated_types
import torch
from torch import Tensor

from cutaway.core.errors import ParameterError
from cutaway.core.inputs import Inputs
from cutaway.core.method import method
from cutaway.core.params import Count, Image, Prompt, Prompts, Sites, Target
from cutaway.core.proof import Check, Proof
from cutaway.core.site import Site
from cutaway.models.handle import Model
from cutaway.ops.ablation import Ablation, Effect
from cutaway.ops.draws import Draws, proof_of, sizes
from cutaway.ops.origin import components, other_prompt
from cutaway.ops.parts import unpadded
from cutaway.ops.units import Unit
from cutaway.results.ranking import Ranking
from cutaway.results.series import Series

MEASURES = {"log-probability": "nats", "probability": "", "rank": "places"}


@method(cites="yu2024neuron", example={"prompt": "#5 #9 #6 #7 #8", "sites": "L1.mlp.act[0-3]"})
def ablate(
    model: Model,
    prompt: Prompt,
    ranking: Ranking | None = None,
    sites: Sites | None = None,
    image: Image | None = None,
    target: Target | None = None,
    then: list[Target] | None = None,
    how: Literal["zero", "mean", "resample"] = "zero",
    reach: Literal["all", "last"] = "all",
    reference: Prompts | None = None,
    measure: Literal["log-probability", "probability", "rank"] = "log-probability",
    most: Count = 100,
    reverse: bool = True,
    draws: Annotated[int, annotated_types.Ge(Proof.MIN_DRAWS)] = 5,
    seed: int = 0,
) -> Series:
    """What the answer loses when the first k components are taken away, over k, against random ones.

    Each random draw holds as many components of the same kinds and layers, none of those named. The reverse curve takes
    everything of those kinds away, in all layers, but the first k. All sets run as rows of one batch.

    Source: Yu and Ananiadou (2024), "Neuron-level knowledge attribution in large language models", section 4.

    Args:
        prompt: text or token ids.
        ranking: a ranking whose items are components, as the locating methods make; its order is kept, and the
            embedding left out.
        sites: heads (attn.z), neurons (mlp.act, expert.act) or sublayers (attn.out, mlp.out), instead of a ranking.
        image: an image that goes with the prompt.
        target: the token of the answer; the model's own when it is not given.
        then: tokens that follow the target, teacher-forced.
        how: what activations become: zero, their mean over the reference prompts, or those of a position of theirs
            drawn at random. What a head brings from one position can only be taken away.
        reach: at all positions, as if weights were taken out, or at the positions that are read alone.
        reference: prompts for mean and resample; the prompt itself when none are given.
        measure: what the lines show the drop of; rank counts places lost.
        most: the largest k.
        reverse: add the curve "all but the first k".
        draws: random draws, at least 5.
        seed: of the draws, and of resampled positions.

    Returns:
        drops [line, k]; for random draws their mean, with the smallest and largest as interval.

    Raises:
        ParameterError: neither or both of ranking and sites, or no room for random draws. SiteError: an item is no
        component, or is not there.
    """
    if (ranking is None) == (sites is None):
        found = "neither is given" if ranking is None else "both are given"
        raise ParameterError("parameters 'ranking' and 'sites'", found, "give one of them")
    batch = unpadded(model.inputs(prompt, image))
    if target is None:
        target = int(model(batch)[0, batch.last[0]].argmax())
    ids = [target, *(then or ())]
    run = batch.extend(ids[:-1], [model.decode(i) for i in ids[:-1]]) if len(ids) > 1 else batch
    every, notes = _units(model, ranking, sites, run)
    notes += other_prompt(model, prompt, batch, ranking)
    units = every[:most]
    by_source = any(unit.source >= 0 for unit in units)
    if by_source and how != "zero":
        raise ParameterError(f"how={how!r}", f"'{units[0]}' is brought from one position", "use how='zero'")
    drawer = Draws(model, units, run.ids.shape[1], seed)
    if drawer.most == 0:
        raise ParameterError("random draws", f"too few others are there beside {units[0]}", "name fewer components")
    ks = sizes(drawer.most)
    ablation = Ablation(model, run, ids, how, reach, _reference(model, reference), seed)
    sets = drawer.sets(ks, draws)
    base = ablation.base()
    curves = [("top k away", "random k away", _drops(base, ablation(sets)))]
    if reverse and not by_source:
        curves.append(
            ("all but top k away", "all but random k away", _drops(base, ablation.keeping(sets, _all(drawer))))
        )
    n, shown = len(ks), list(MEASURES).index(measure)
    lines, y, lo, hi = [], [], [], []
    for first, second, drops in curves:
        named, random = drops[shown, :n], drops[shown, n:].view(draws, n)
        lines += [first, second]
        y += [named, random.mean(0)]
        lo += [torch.full_like(named, float("nan")), random.amin(0)]
        hi += [torch.full_like(named, float("nan")), random.amax(0)]
    drop = curves[0][2]
    word = {"zero": "zeroing", "mean": "setting to the mean", "resample": "resampling"}[how]
    answer = " ".join(model.decode(i).strip() for i in ids)
    notes += [
        f"log p({answer}) is {float(base.logp):.4g}, its probability {float(base.prob):.4g}, its rank {int(base.rank)}",
        f"without the first {ks[-1]}: log p falls by {float(drop[0, n - 1]):.4g}, the probability by "
        f"{float(drop[1, n - 1]):.4g}, {int(drop[2, n - 1])} places lost",
    ]
    if len(every) > ks[-1]:
        notes.append(f"the first {ks[-1]} of {len(every)} are used")
    if reverse and by_source:
        notes.append("no reverse curve: what heads bring from single positions cannot be all that is left")
    return Series(
        title=f"{model.name} without the named components, answer {answer!r}",
        x=ks,
        y=torch.stack(y),
        lo=torch.stack(lo),
        hi=torch.stack(hi),
        x_name="k",
        measure=f"drop in {measure}",
        unit=MEASURES[measure],
        log_x=True,
        labels={"line": tuple(lines)},
        check=_check(ablation, base),
        proof=proof_of(
            drop[0, :n],
            drop[0, n:].view(draws, n),
            ks,
            f"{word} the first components",
            drawer.matched,
            distinct=drawer.distinct,
        ),
        notes=tuple(notes),
    )


def _units(
    model: Model, ranking: Ranking | None, sites: list[Site] | None, inputs: Inputs
) -> tuple[list[Unit], list[str]]:
    """The components, each there in this model, and a note where an item of the ranking is left out."""
    notes: list[str] = []
    if ranking is not None:
        units, notes = components(model, ranking.items, inputs)
    else:
        units = [
            unit for site in model.expand(sites or (), inputs) for unit in Unit.of_site(site, model.anatomy(inputs))
        ]
    if not units:
        raise ParameterError("components to take away", "none is named", "give some")
    return list(dict.fromkeys(units)), notes


def _reference(model: Model, prompts: object) -> list[Inputs]:
    if prompts is None:
        return []
    return [model.inputs(prompts)]


def _drops(base: Effect, after: Effect) -> Tensor:
    """[measure, set] what was lost of log-probability, probability and rank."""
    return torch.stack([base.logp - after.logp, base.prob - after.prob, after.rank - base.rank]).double()


def _all(drawer: Draws) -> list[Unit]:
    """One component of every layer and kind that is compared."""
    return [pool.unit(layer, 0) for pool in drawer.pools.values() for layer in pool.shapes]


def _check(ablation: Ablation, base: Effect) -> Check:
    """Taking nothing away, in a batch, changes nothing."""
    nothing = ablation([(), ()])
    error = float((nothing.logp - base.logp).abs().max())
    return Check(name="rows without an ablation give the plain run", value=error, tolerance=1e-4)
