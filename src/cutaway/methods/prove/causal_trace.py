"""Causal tracing: which states bring an answer back when its subject was drowned in noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import annotated_types
import torch
from torch import Tensor

from cutaway.core.errors import InputError, ParameterError, UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Add, Intervention, Set
from cutaway.core.method import method
from cutaway.core.metric import Metric
from cutaway.core.params import Count, DrawCount, Image, Layers, MetricLike, Positions, Prompt
from cutaway.core.proof import Check, Proof
from cutaway.core.site import Items, Site
from cutaway.engine.gradients import Run, observe
from cutaway.engine.patching import Cells, part
from cutaway.engine.replay import BUDGET, replay
from cutaway.engine.together import run_together
from cutaway.models.handle import Model
from cutaway.ops.draws import prove_sets
from cutaway.ops.spans import find
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
    prompt: Prompt,
    subject: str,
    metric: MetricLike | None = None,
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

    Source: Meng, Bau, Andonian and Belinkov (2022), "Locating and editing factual associations in GPT".

    Args:
        prompt: text or token ids.
        subject: the words that are drowned, as they stand in the prompt.
        metric: what is measured; the probability of the model's own answer when it is not given.
        restore: states of the residual stream after a layer, or what MLPs or attention add to it.
        window: how many layers are restored together, centred at the cell's layer.
        noise: size of the noise, in standard deviations of the subject's token embeddings.
        samples: how many times noise is drawn.
        layers: the layers to restore; all when it is not given.
        positions: the positions to restore.
        normalise: divide by what the noise takes away on average.
        image: an image that goes with the prompt.
        draws: random sets of cells in the proof, at least 5; 0 leaves it out.
        seed: of the noise and of the draws.
        budget: bytes that the replayed rows may take.

    Returns:
        [statistic, layer, position] mean and standard deviation over the draws of noise: of what comes back, as a share
        of what the noise takes away, or in the metric's unit.

    Raises:
        InputError: the subject is not in the prompt; the sentence names the tokens. ParameterError: the noise changes
        nothing.
    """
    given = model.inputs(prompt, image)
    if len(given) != 1:
        raise InputError("causal_trace", f"{len(given)} prompts", "give one per call")
    if metric is None:
        answer = int(model(given)[0, given.last[0]].argmax())
        metric = Metric("prob", (answer,), words=(model.decode(answer),))
    trace = _Trace(model, metric, given, subject, noise, samples, seed, budget)
    cells = Cells.of(model, KINDS[restore], "position", layers, positions, 1, given)
    trace.observe(cells, KINDS[restore], window)
    noised = trace.values([()])[0]
    taken = trace.clean.value(metric) - float(noised.mean())
    if normalise and abs(taken) < 1e-6:
        said = f"it takes nothing of {metric}, which is {trace.clean.value(metric):.6g}"
        raise ParameterError(f"noise on {subject!r}", said, "raise it, or normalise=False")
    back = trace.values([(cell,) for cell in cells.flat]) - noised
    unit = taken if normalise else 1.0
    shape = (len(cells.rows), -1)
    spread = back.std(1) if samples > 1 else torch.zeros(len(back))
    sign = 1 if taken >= 0 else -1
    strongest = int(back.mean(1).abs().argmax())
    error = trace.plainly(cells.flat[strongest]) - float((back + noised)[strongest, 0])
    proof = prove_sets(
        lambda sets: sign * (trace.values([[cells.flat[i] for i in some] for some in sets]) - noised).mean(1),
        back.mean(1) * sign,
        [cell.layer for cell in cells.flat],
        draws,
        seed,
        ablated="restoring the strongest cells together",
        metric=str(metric),
        unit=metric.unit,
        matched="layer",
    )
    what = {"states": "states", "mlp": "MLPs", "attention": "attention"}[restore]
    return Grid(
        title=f"{what} restored in {model.name}, noise on {subject!r}",
        values=torch.stack([back.mean(1).double().view(shape) / unit, spread.double().view(shape) / abs(unit)]),
        axes=("statistic", "layer", "position"),
        measure="share of the answer that comes back" if normalise else f"change of {metric}",
        unit="1 = all that the noise took" if normalise else metric.unit,
        labels={
            "statistic": ("mean", "standard deviation"),
            "layer": cells.layers,
            "position": cells.labels,
        },
        check=Check(
            name="the strongest cell under the first noise, in a whole forward pass",
            value=error,
            tolerance=rounding(model.dtype) * max(1.0, float(noised.abs().max()), abs(taken)),
        ),
        proof=proof,
        notes=(
            f"{metric}: {trace.clean.value(metric):.6g} without noise, {float(noised.mean()):.6g} with it (standard "
            f"deviation {float(noised.std()) if samples > 1 else 0.0:.3g} over {samples} draws, {metric.unit})",
            *(
                ["the noise does not take the metric away, it raises it: cells are shares of that rise"]
                if taken < 0 and normalise
                else []
            ),
            f"noise of {noise:g} standard deviations ({trace.size:.4g}) on tokens {trace.subject}",
            f"{window} layer{'s'[: window > 1]} restored per cell; how: {trace.how}",
            *(["no proof: nothing comes back, or there are too few cells"] if draws and proof is None else []),
        ),
    )


class _Trace:
    """One prompt under several draws of noise, and what is there without it."""

    def __init__(
        self,
        model: Model,
        metric: Metric,
        given: Inputs,
        subject: str,
        noise: float,
        samples: int,
        seed: int,
        budget: int,
    ) -> None:
        self.model, self.metric, self.budget = model, metric, budget
        self.prompt, self.inputs, self.how = given, metric.prepare(given), "replay"
        self.subject = find(given, subject, "subject")
        at = Items.of(self.subject)
        self.embedded, self.entering = Site("embed", positions=at), START.at(positions=at)
        plain = observe(model, self.inputs, [self.embedded]).values[self.embedded]
        self.size = noise * float(plain.float().std())
        drawn = torch.randn((samples, *plain.shape[1:]), generator=torch.Generator().manual_seed(seed)) * self.size
        self.noises = [Add(self.embedded, one[None].to(plain)) for one in drawn]
        self.starts = [Set(self.entering, self._entering(one)) for one in self.noises]

    def _entering(self, noise: Add) -> Tensor:
        return self.model.trace(self.inputs, want=self.entering, do=noise, stop=True)[self.entering]

    def observe(self, cells: Cells, kind: str, window: int) -> None:
        """The run without noise, at everything that cells restore."""
        n = len(self.model.layers)
        self.window = {i: range(max(0, i - window // 2), min(n, i - window // 2 + window)) for i in cells.layers}
        sites = {Site(kind, Items.of(j)) for span in self.window.values() for j in span}
        have = [site for site in sites if self.model.layers[site.layer].has(kind)]
        self.clean: Run = observe(self.model, self.inputs, have)

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
        return found.float().cpu().view(len(sets), -1)

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
