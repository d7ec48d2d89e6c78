"""The metric without some of the image: states of image positions, where they enter the language model, are emptied."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Add, Intervention, Set
from cutaway.core.metric import Metric
from cutaway.core.site import Items
from cutaway.engine.replay import replay
from cutaway.models.handle import Model

Filling = Literal["mean", "zero"]


class Occlusion:
    """Empties image positions of one prompt, one set per run.

    A position's state before the first layer becomes the mean over ``positions``, or zero; what a model adds to image
    positions between later layers (DeepStack) is replaced in the same way.

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
        found = replay(self.model, self.inputs, [self._emptied(sorted(some)) for some in sets], self.metric)
        return found.values.double(), found.base.double(), found.how

    def _emptied(self, some: Sequence[int]) -> Intervention | list[Intervention]:
        states, later = self._entering
        at, rows = Items.of(some), [self.positions.index(p) for p in some]
        first = Set(f"L0.resid_pre@{at}", self._filled(states))
        others = [Add(f"L{i}.resid_pre@{at}", self._filled(gap) - gap[rows]) for i, gap in later.items()]
        return [first, *others] if others else first

    def _filled(self, states: Tensor) -> Tensor:
        return states.mean(0) if self.filling == "mean" else torch.zeros_like(states[0])
