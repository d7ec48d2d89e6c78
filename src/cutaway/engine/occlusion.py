"""The metric without some of the image: states of image positions, where they enter the language model, are emptied."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from cutaway.core.errors import UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Add, Intervention, Set
from cutaway.core.metric import Metric
from cutaway.core.progress import track
from cutaway.core.site import Items
from cutaway.engine.replay import replay
from cutaway.models.handle import Model

Filling = Literal["mean", "zero"]


class Occlusion:
    """Empties image positions of one prompt, one set per run.

    A position's state before the first layer becomes the mean over ``positions``, or zero. What a model adds to image
    positions between later layers (DeepStack) is replaced in the same way; such sweeps take a whole pass per run,
    others go through replay.

    Args:
        positions: all image positions, over which means are taken.
    """

    def __init__(
        self, model: Model, inputs: Inputs, positions: Sequence[int], filling: Filling, metric: Metric
    ) -> None:
        self.model, self.inputs, self.metric = model, inputs, metric
        self.positions, self.filling = list(positions), filling

    @cached_property
    def _entering(self) -> tuple[Tensor, dict[int, Tensor]]:
        """[position, d_model] states before the first layer, and what is added to them in front of later layers."""
        at, n = f"@{Items.of(self.positions)}", self.model.n_layers
        ends = [f"L{i}.resid_post{at}" for i in range(n - 1)]
        trace = self.model.trace(self.inputs, want=[*(f"L{i}.resid_pre{at}" for i in range(n)), *ends])
        gaps = {i: trace[f"L{i}.resid_pre{at}"][0] - trace[f"L{i - 1}.resid_post{at}"][0] for i in range(1, n)}
        return trace[f"L0.resid_pre{at}"][0], {i: gap for i, gap in gaps.items() if bool(gap.any())}

    def __call__(self, sets: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, str]:
        """([set] the metric without each set of positions, [] as it is, how it was run)."""
        if not self._entering[1]:
            found = replay(self.model, self.inputs, [self._first(some) for some in sets], self.metric)
            return found.values.double(), found.base.double(), found.how
        runs = [(self._first(some), *self._others(some)) for some in sets]
        values = [self._run(do) for do in track(runs, "occlusions", total=len(runs))]
        how = "plain: the model adds image features between later layers too"
        return torch.stack(values).double(), self._run(()).double(), how

    def _run(self, do: Sequence[Intervention]) -> Tensor:
        logits = self.model.trace(self.inputs, do=do).logits
        if logits is None:
            raise UnsupportedError(f"run {self.model.name}", "it returned no logits", "")
        return self.metric(logits, self.inputs)[0]

    def _first(self, some: Sequence[int]) -> Intervention:
        return Set(f"L0.resid_pre@{Items.of(sorted(some))}", self._filled(self._entering[0]))

    def _others(self, some: Sequence[int]) -> list[Intervention]:
        rows = [self.positions.index(p) for p in sorted(some)]
        site = f"resid_pre@{Items.of(sorted(some))}"
        return [Add(f"L{i}.{site}", self._filled(gap) - gap[rows]) for i, gap in self._entering[1].items()]

    def _filled(self, states: Tensor) -> Tensor:
        return states.mean(0) if self.filling == "mean" else torch.zeros_like(states[0])
