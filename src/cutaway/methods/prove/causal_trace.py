"""Causal tracing: which states bring an answer back when its subject was drowned in noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import annotated_types
import torch
from torch import Tensor

from cutaway.core.errors import MismatchError, ParameterError, UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Add, Intervention, Set
from cutaway.core.method import method
from cutaway.core.metric import Metric
from cutaway.core.params import Count, DrawCount, Image, Layers, MetricLike, Positions, Prompts, Target, Words
from cutaway.core.progress import track
from cutaway.core.proof import Check, Proof
from cutaway.core.site import Items, Site
from cutaway.engine.exchanges import Kept, called, metrics_of, rows_of, size_of
from cutaway.engine.gradients import Run, observe
from cutaway.engine.patching import Cells, part
from cutaway.engine.replay import BUDGET, replay
from cutaway.engine.together import run_together
from cutaway.models.handle import Model
from cutaway.ops.draws import prove_sets
from cutaway.ops.means import LEAST, Ends, means_of, over, over_pairs
from cutaway.ops.spans import find, named
from cutaway.ops.watched import rounding
from cutaway.results.grid import Grid

KINDS = {"states": "resid_post", "mlp": "mlp.out", "attention": "attn.out"}
START = Site("resid_pre", Items.of(0))


@method(
    cites="meng2022rome",
    example={"prompt": "#70 #71 #72 #73", "subject": "#71 #72", "metric": "logit_diff: #11, #22", "samples": "3"},
)
def causal_trace(
    model: Model,
    prompt: Prompts,
    subject: Words,
    metric: MetricLike | None = None,
    answers: list[Target] | None = None,
    rivals: list[Target] | None = None,
    restore: Literal["states", "mlp", "attention"] = "states",
    window: Count = 1,
    noise: Annotated[float, annotated_types.Gt(0)] = 3.0,
    samples: Count = 10,
    layers: Layers | None = None,
    positions: Positions = "all",
    normalise: bool = True,
    image: Image | None = None,
    draws: DrawCount = Proof.MIN_DRAWS,
    seed: int = 0,
    budget: Count = BUDGET,
) -> Grid:
    """How much of the answer comes back when noise is on the subject and one state, or a window of layers, is restored.

    Gaussian noise is added to the subject's token embeddings, ``noise`` times as large as their standard deviation.
    Then, for every layer and position, states (or what MLPs or attention add, over ``window`` layers around it) are set
    to what they are without noise. Noise is drawn several times; all draws and cells run together. The check repeats
    the strongest cell in a whole forward pass; the proof restores the strongest cells together, against random ones.

    Of several prompts come means over prompts with their standard errors. Normalised, that is what comes back on
    average divided by what the noise takes on average.

    Source: Meng, Bau, Andonian and Belinkov (2022), "Locating and editing factual associations in GPT".

    Args:
        prompt: text or token ids, of one prompt or several.
        subject: the words that are drowned, as they stand in the prompt: one for all prompts, or one for each.
        metric: what is measured; the probability of the model's own answer when it is not given.
        answers: instead of a metric: each prompt's own answer, whose log-probability is measured.
        rivals: each prompt's own rival, whose logit is then taken off that of the answer.
        restore: states of the residual stream after a layer, or what MLPs or attention add to it.
        window: how many layers are restored together, centred at the cell's layer.
        noise: size of the noise, in standard deviations of the subject's token embeddings.
        samples: how many times noise is drawn.
        layers: the layers to restore; all when it is not given.
        positions: the positions to restore, as many in every prompt: where lengths differ, count them from the end
            (``-3--1``).
        normalise: divide by what the noise takes away on average.
        image: an image that goes with the prompt, with every one of several.
        draws: random sets of cells in the proof, at least 5; 0 leaves it out.
        seed: of the noise and of the draws.
        budget: bytes that the replayed rows may take, and what is kept of all prompts.

    Returns:
        [statistic, layer, position] mean and standard deviation over the draws of noise: of what comes back, as a share
        of what the noise takes away, or in the metric's unit; of several prompts the mean of each.

    Raises:
        InputError: the subject is not in the prompt; the sentence names the tokens. MismatchError: neither one subject
        nor one for each prompt, or prompts that do not have as many positions. ParameterError: the noise changes
        nothing.
    """
    given = rows_of(model, prompt, image)
    if len(subject) not in (1, len(given)):
        said = f"{len(subject)} for {len(given)} prompts"
        raise MismatchError("subjects", said, "give one for all prompts, or one for each")
    subjects = subject * len(given) if len(subject) == 1 else subject
    metrics = [
        own or _answer(model, each)
        for own, each in zip(metrics_of(model, len(given), metric, answers, rivals), given, strict=True)
    ]
    cells = Cells.over(model, KINDS[restore], "position", layers, positions, 1, given)
    numbers = range(len(given))
    places = [find(given[i], subjects[i], f"subject of prompt {i}" if len(given) > 1 else "subject") for i in numbers]

    def make(i: int) -> _Trace:
        trace = _Trace(model, metrics[i], given[i], places[i], noise, samples, seed, budget)
        return trace.observe(cells[i], KINDS[restore], window)

    kept = Kept(make, lambda trace: size_of(trace.clean.values), budget)
    found = [kept[i].back(cells[i]) for i in track(numbers, "prompts", total=len(given))]
    measure, metric_unit = called(metrics), metrics[0].unit
    both = Ends.of([(float(one.noised.mean()), one.clean) for one in found], measure, metric_unit)
    drowned = f"{len(subjects)} subjects" if len(subject) > 1 else repr(named(subject[0]))
    if normalise and abs(both.between) < LEAST:
        said = f"it takes nothing of {measure}, which is {both.means[1]:.6g}"
        raise ParameterError(f"noise on {drowned}", said, "raise it, or normalise=False")
    backs = torch.stack([one.values.mean(1).double() for one in found])
    spreads = torch.stack([_deviation(one.values).double() for one in found])

    def effect(sets: list[list[int]]) -> Tensor:
        restored = [kept[i].values([[cells[i].flat[c] for c in some] for some in sets]) for i in numbers]
        return both.sign * torch.stack([(x - one.noised).mean(1) for x, one in zip(restored, found, strict=True)]).mean(
            0
        )

    proof = prove_sets(
        effect,
        backs.mean(0) * both.sign,
        [cell.layer for cell in cells[0].flat],
        draws,
        seed,
        ablated="restoring the strongest cells together",
        metric=measure,
        unit=metric_unit,
        matched="layer",
    )
    statistics = torch.stack([backs, spreads * both.sign if normalise else spreads], 1)
    grid, error = both.shares(statistics) if normalise else over(statistics)
    shape = (2, len(cells[0].rows), -1)
    how = " or ".join(dict.fromkeys(one.how for one in found))
    what = {"states": "states", "mlp": "MLPs", "attention": "attention"}[restore]
    return Grid(
        title=f"{what} restored in {model.name}, noise on {drowned}{means_of(len(given), 'prompts')}",
        values=grid.view(shape),
        standard_error=None if error is None else error.view(shape),
        axes=("statistic", "layer", "position"),
        measure="share of the answer that comes back" if normalise else f"change of {measure}",
        unit="1 = all that the noise took" if normalise else metric_unit,
        labels={
            "statistic": ("mean", "standard deviation"),
            "layer": cells[0].layers,
            "position": cells[0].labels,
        },
        check=_check(kept, cells, found, int(backs.mean(0).abs().argmax()), rounding(model.dtype)),
        proof=proof,
        notes=(
            *_noise_notes(both, found, noise, places, normalise),
            f"{window} layer{'s'[: window > 1]} restored per cell; how: {how}",
            *(["no proof: nothing comes back, or there are too few cells"] if draws and proof is None else []),
        ),
    )


def _answer(model: Model, given: Inputs) -> Metric:
    """The probability of the model's own answer."""
    answer = int(model(given)[0, given.last[0]].argmax())
    return Metric("prob", (answer,), words=(model.decode(answer),))


def _deviation(values: Tensor) -> Tensor:
    """Standard deviation over the draws of noise, the last axis; 0 of a single one."""
    return values.std(-1) if values.shape[-1] > 1 else torch.zeros(values.shape[:-1])


@dataclass(frozen=True)
class _Back:
    """What comes back in one prompt.

    Attributes:
        clean: the metric without noise. noised: [draw] with it. values: [cell, draw] what restoring each cell adds.
        size: standard deviation of the noise. how: how runs ran.
    """

    clean: float
    noised: Tensor
    values: Tensor
    size: float
    how: str


def _check(
    kept: Kept[_Trace], cells: Sequence[Cells], found: Sequence[_Back], strongest: int, precision: float
) -> Check:
    """The strongest cell under the first noise in every prompt; the prompt where it is furthest off counts."""
    errors = []
    for i, one in enumerate(found):
        exact = kept[i].plainly(cells[i].flat[strongest])
        errors.append(exact - float((one.values + one.noised)[strongest, 0]))
    ends = [abs(x) for one in found for x in (float(one.noised.abs().max()), one.clean - float(one.noised.mean()))]
    return Check(
        name="the strongest cell under the first noise, in a whole forward pass",
        value=max(errors, key=abs),
        tolerance=precision * max(1.0, *ends),
    )


def _noise_notes(
    both: Ends, found: Sequence[_Back], noise: float, places: Sequence[Sequence[int]], normalise: bool
) -> list[str]:
    """What the noise was, and what it took."""
    noised, clean = both.means
    n, draws = len(found), len(found[0].noised)
    deviation, size = (
        sum(x) / n for x in ([float(_deviation(one.noised)) for one in found], [one.size for one in found])
    )
    said = [
        f"{both.metric}: {clean:.6g} without noise, {noised:.6g} with it (standard deviation {deviation:.3g} over "
        f"{draws} draws, {both.unit})"
    ]
    said += over_pairs(both.differences, "prompts") if n > 1 else []
    if both.between < 0 and normalise:
        said.append("the noise does not take the metric away, it raises it: cells are shares of that rise")
    where = f"tokens {list(places[0])}" if n == 1 else "the tokens of each subject"
    return [*said, f"noise of {noise:g} standard deviations ({size:.4g}) on {where}"]


class _Trace:
    """One prompt under several draws of noise, and what is there without it."""

    def __init__(
        self,
        model: Model,
        metric: Metric,
        given: Inputs,
        places: Sequence[int],
        noise: float,
        samples: int,
        seed: int,
        budget: int,
    ) -> None:
        self.model, self.metric, self.budget = model, metric, budget
        self.prompt, self.inputs, self.how = given, metric.prepare(given), "replay"
        at = Items.of(places)
        self.embedded, self.entering = Site("embed", positions=at), START.at(positions=at)
        plain = observe(model, self.inputs, [self.embedded]).values[self.embedded]
        self.size = noise * float(plain.float().std())
        drawn = torch.randn((samples, *plain.shape[1:]), generator=torch.Generator().manual_seed(seed)) * self.size
        self.noises = [Add(self.embedded, one[None].to(plain)) for one in drawn]
        self.starts = [Set(self.entering, self._entering(one)) for one in self.noises]

    def _entering(self, noise: Add) -> Tensor:
        return self.model.trace(self.inputs, want=self.entering, do=noise, stop=True)[self.entering]

    def observe(self, cells: Cells, kind: str, window: int) -> _Trace:
        """Itself, with the run without noise at everything that cells restore."""
        n = len(self.model.layers)
        self.window = {i: range(max(0, i - window // 2), min(n, i - window // 2 + window)) for i in cells.layers}
        sites = {Site(kind, Items.of(j)) for span in self.window.values() for j in span}
        have = [site for site in sites if self.model.layers[site.layer].has(kind)]
        self.clean: Run = observe(self.model, self.inputs, have)
        return self

    def back(self, cells: Cells) -> _Back:
        """What every cell alone brings back."""
        noised = self.values([()])[0]
        values = self.values([(cell,) for cell in cells.flat]) - noised
        return _Back(self.clean.value(self.metric), noised, values, self.size, self.how)

    def values(self, sets: Sequence[Sequence[Site]]) -> Tensor:
        """[set, draw] the metric with noise and each set of cells restored."""
        restored = [self._restored(some) for some in sets]
        try:
            runs = [[start, *some] for some in restored for start in self.starts]
            found = replay(self.model, self.prompt, runs, self.metric, budget=self.budget, plain=False).values
        except UnsupportedError as error:
            self.how = f"rows of a batch: {error.found}"
            runs = [[noise, *some] for some in restored for noise in self.noises]
            found = run_together(self.model, self.inputs, runs, self.metric, "restored")
        return found.float().view(len(sets), -1)

    def plainly(self, cell: Site) -> float:
        """The metric with the first noise and one cell restored, in a whole forward pass."""
        logits = self.model.trace(self.inputs, do=[self.noises[0], *self._restored((cell,))]).logits
        if logits is None:
            raise UnsupportedError("causal_trace", "the model returned no logits", "")
        return float(self.metric(logits, self.inputs)[0])

    def _restored(self, some: Sequence[Site]) -> list[Intervention]:
        places = dict.fromkeys(cell.at(layer=j) for cell in some for j in self.window[cell.layer])
        return [
            Set(place, part(self.clean.values[place.whole()], place, self.inputs))
            for place in places
            if place.whole() in self.clean.values
        ]
