"""Neurons of two runs set against each other: what each adds to one answer here and there, exactly where it counts.

    CNA(l, k) = Imp_A(l, k) - Imp_B(l, k)

Both are read through run A's final norm, frozen at A's last state, each from the state that the layer reads in its own
run. The largest are found without computing all: Imp_A has its first-order form for an upper bound, and Imp_B has one
from below,

    Imp_B >= <v, grad log p(w)> - range(logits changed by v)^2 / 8,

because the logarithm of a mean of exponentials lies no further above the mean (Hoeffding 1963). A neuron that pushes
against the answer in run B alone has a large difference too; "lost" counts it as nothing there: Imp_A - max(Imp_B, 0).

Source: Yu and Ananiadou (2024), "Interpreting arithmetic mechanism in large language models through comparative neuron
analysis".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cutaway.ops.importance import UNCERTIFIED, Baselines, Goal
from cutaway.ops.parts import Group, Parts
from cutaway.ops.topk import BLOCK, TopK, certified_topk
from cutaway.ops.units import Unit

By = Literal["difference", "lost", "importance"]
Key = tuple[int, int]
"""A group of neurons: layer, and expert or -1."""


@dataclass(frozen=True)
class Case:
    """One prompt in both runs.

    Attributes:
        goal: the answer's log-probability, through run A's frozen readout.
        a, b: the runs taken apart.
    """

    goal: Goal
    a: Parts
    b: Parts


class Comparison:
    """The FFN neurons of some layers in both runs of some prompts; scores are means over the prompts."""

    def __init__(self, cases: Sequence[Case], layers: Sequence[int]) -> None:
        self.cases = list(cases)
        self.sides = [(_Side(c.goal, c.a, layers), _Side(c.goal, c.b, layers)) for c in self.cases]
        sizes: dict[Key, int] = {}
        for pair in self.sides:
            for side in pair:
                sizes |= {key: len(group) for key, group in side.groups.items()}
        self.keys = sorted(sizes)
        lengths = torch.tensor([sizes[key] for key in self.keys])
        self.starts = torch.cumsum(lengths, 0) - lengths
        self.total = int(lengths.sum())
        self.sizes = sizes

    @property
    def certified(self) -> bool:
        """Whether bounds are bounds: not under a soft cap, whose changes of logits are not linear in a vector."""
        shapes = [case.goal.readout.head.slope_and_cap for case in self.cases]
        linear = all(case.goal.readout.linear for case in self.cases)
        return linear and all(shape is not None and shape[1] == float("inf") for shape in shapes)

    def top(self, k: int, by: By) -> TopK:
        """The k neurons with the largest score: difference, what is lost, or plain importance in run A."""
        bound = torch.stack([self._bound(a, b, by) for a, b in self.sides]).mean(0)

        def exact(index: Tensor) -> Tensor:
            return self.score(index, by)

        if self.certified:
            return certified_topk(bound, exact, k, block=max(BLOCK, k))
        tried = bound.topk(min(UNCERTIFIED * k, len(bound))).indices
        scores = exact(tried)
        best = scores.topk(min(k, len(tried)))
        return TopK(tried[best.indices], best.values, len(tried), len(bound))

    def score(self, index: Tensor, by: By) -> Tensor:
        """[m] mean scores of neurons, exact."""
        if by == "importance":
            return self.importance(index, 0)
        split, n = self._split(index), len(index)
        theirs = [pair[1].importance(split, n) for pair in self.sides]
        theirs = [each.clamp_min(0) for each in theirs] if by == "lost" else theirs
        return self.importance(index, 0) - torch.stack(theirs).mean(0)

    def importance(self, index: Tensor, side: int) -> Tensor:
        """[m] mean importance of neurons in run A (side 0) or B (1), exact."""
        found = torch.zeros(len(index), device=index.device)
        for pair in self.sides:
            found += pair[side].importance(self._split(index), len(index))
        return found / len(self.sides)

    def coefficients(self, index: Tensor, side: int) -> Tensor:
        """[case, m] what each neuron's column is multiplied with at the last position."""
        return torch.stack([pair[side].coefficients(self._split(index), len(index)) for pair in self.sides])

    def units(self, index: Tensor) -> list[Unit]:
        """The neurons by name."""
        found = []
        for i in index.tolist():
            g = int(torch.bucketize(torch.tensor(i), self.starts, right=True)) - 1
            (layer, expert), local = self.keys[g], i - int(self.starts[g])
            found.append(Unit("mlp.act", layer, local) if expert < 0 else Unit("expert.act", layer, expert, local))
        return found

    def _split(self, index: Tensor) -> dict[Key, tuple[Tensor, Tensor]]:
        """By group: where its neurons stand in ``index``, and which of its own they are."""
        of = torch.bucketize(index.cpu(), self.starts, right=True) - 1
        found = {}
        for g in of.unique().tolist():
            at = (of == g).nonzero().flatten().to(index.device)
            found[self.keys[g]] = at, index[at] - int(self.starts[g])
        return found

    def _bound(self, a: _Side, b: _Side, by: By) -> Tensor:
        parts = []
        for key in self.keys:
            bound = a.upper(key, self.sizes[key])
            if by != "importance":
                lower = b.lower(key, self.sizes[key])
                bound = bound - (lower.clamp_min(0) if by == "lost" else lower)
            parts.append(bound)
        return torch.cat(parts)


class _Side:
    """One run of one prompt: its groups, each with the state that it adds to. A group that is missing adds nothing."""

    def __init__(self, goal: Goal, parts: Parts, layers: Sequence[int]) -> None:
        self.goal = goal
        self.groups: dict[Key, Group] = {(g.layer, g.expert): g for g in parts.groups if g.layer in layers}
        states = sorted({layer for layer, _ in self.groups})
        self.device = parts.final.device
        self.at = {layer: n for n, layer in enumerate(states)}
        self.bases = Baselines(goal, torch.stack([parts.layers[i].before_mlp for i in states])) if states else None

    def upper(self, key: Key, size: int) -> Tensor:
        """[neuron] bounds of importance from above."""
        if key not in self.groups or self.bases is None:
            return torch.zeros(size, device=self.device)
        return self.bases.bounds(self.at[key[0]], self.groups[key])

    def lower(self, key: Key, size: int) -> Tensor:
        """[neuron] bounds of importance from below."""
        if key not in self.groups or self.bases is None:
            return torch.zeros(size, device=self.device)
        group, readout = self.groups[key], self.goal.readout
        first = group.first_order(self.bases.gradient[self.at[key[0]]])
        shape = readout.head.slope_and_cap
        if not readout.linear or shape is None:
            return first
        length = readout.norm(group.writer(group.rows.float()[:, None]))[:, 0].norm(dim=-1)
        spread = 2 * shape[0] * readout.head.row_squares.max().sqrt() * length * group.coef[0, 0].float().abs()
        return first - spread.square() / 8

    def importance(self, split: dict[Key, tuple[Tensor, Tensor]], n: int) -> Tensor:
        found = torch.zeros(n, device=self.device)
        for key, (at, local) in split.items():
            if key in self.groups and self.bases is not None:
                vectors = self.groups[key].vectors(local)
                which = torch.full((len(local),), self.at[key[0]], device=self.device)
                found[at] = torch.cat(
                    [self.bases.added(w, v) for w, v in zip(which.split(BLOCK), vectors.split(BLOCK), strict=True)]
                )
        return found

    def coefficients(self, split: dict[Key, tuple[Tensor, Tensor]], n: int) -> Tensor:
        found = torch.zeros(n, device=self.device)
        for key, (at, local) in split.items():
            if key in self.groups:
                found[at] = self.groups[key].coef[0, 0, local].float()
        return found
