"""What components add to the log-probability of a target, exactly, and the largest of them without computing all.

    Imp(v | b) = log p(w | b + v) - log p(w | b)

under the frozen readout; the baseline b is the state that the component's layer reads. Its first-order form
``<v, grad log p(w | b)>`` is an upper bound, because log p is concave in the logits; under a soft cap the bound takes
the cap's curvature along. With a rival w' the score is that of the logit difference: it is linear, the bound exact.

Source: Yu and Ananiadou (2024), "Neuron-level knowledge attribution in large language models".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cutaway.core.errors import ParameterError
from cutaway.ops.parts import Group, Parts
from cutaway.ops.readout import CURVATURE, FrozenReadout
from cutaway.ops.topk import BLOCK, TopK, certified_topk
from cutaway.ops.units import Unit

LIKELY = 256  # tokens whose part of a capped readout's curvature is computed, the others' is bounded
CAPPED_PART = 4096  # elements whose vectors are made at a time to bound them under a cap
UNCERTIFIED = 4  # without a bound, so many times k elements are evaluated


@dataclass(frozen=True)
class Goal:
    """What is scored: the log-probability of tokens [R], one per position read, or of one against a rival.

    Attributes:
        readout: frozen at the R positions. ids: the R tokens. rival: the other token; None without one.
    """

    readout: FrozenReadout
    ids: tuple[int, ...]
    rival: int | None = None

    @staticmethod
    def of(readout: FrozenReadout, ids: Sequence[int], rival: int | None = None) -> Goal:
        """The goal, reading no more tokens than it needs.

        Raises:
            ParameterError: the rival is the target itself.
        """
        refuse_same(ids[0], rival)
        return Goal(readout if rival is None else readout.only((ids[0], rival)), tuple(ids), rival)

    @property
    def at(self) -> Tensor:
        """The tokens as a tensor where the readout is."""
        return torch.tensor(self.ids, device=self.readout.weight.device)

    def of_state(self, x: Tensor) -> Tensor:
        """[...] the score of whole states [..., R, d], summed over R."""
        if self.rival is None:
            return self.readout.logp(x, self.at).sum(-1)
        y = self.readout.logits(x)
        return y[..., 0, 0] - y[..., 0, 1]


def refuse_same(token: int, rival: int | None) -> None:
    """ParameterError when a token is its own rival."""
    if token == rival:
        raise ParameterError("parameter 'versus'", f"it is the token that is explained, #{token}", "name two tokens")


class Baselines:
    """States that components are added to, with what is needed to score them.

    Attributes:
        x: [n, R, d] the states. value: [n] their scores. gradient: [n, R, d] of each score with respect to its state.
    """

    def __init__(self, goal: Goal, x: Tensor) -> None:
        self.goal, self.x = goal, x
        if goal.rival is None:
            logp, self.gradient = goal.readout.logp_and_gradient(x, goal.at)
            self.value = logp.sum(-1)
        else:
            self.value, self.gradient = goal.of_state(x), goal.readout.gradient_of_difference(x)

    @cached_property
    def z(self) -> Tensor:
        """[n, R, tokens] the matrix's results."""
        return self.goal.readout.states(self.x)

    def added(self, which: Tensor, v: Tensor) -> Tensor:
        """[b] Imp of vectors [b, R, d], each added to the state that ``which`` [b] names; exact."""
        return self.goal.of_state(self.x[which] + v) - self.value[which]

    def bounds(self, n: int, group: Group) -> Tensor:
        """[elements] upper bounds of Imp over state n; under ``scale='own'`` first-order scores, bounds of nothing."""
        first = group.first_order(self.gradient[n])
        shape = self.goal.readout.head.slope_and_cap
        if not self.goal.readout.linear or (shape is not None and shape[1] == float("inf")):
            return first
        if shape is None:
            return torch.full_like(first, float("inf"))
        parts = torch.arange(len(first), device=first.device).split(CAPPED_PART)
        return torch.cat([self._capped(n, group.vectors(part), *shape) for part in parts])

    def _capped(self, n: int, v: Tensor, slope: float, cap: float) -> Tensor:
        """[b] bounds for vectors [b, R, d] under ``cap * tanh(slope * z / cap)``.

        With d_i the change of capped logit i, convexity of log-sum-exp gives Imp <= d_w - sum p_i d_i. d_w is computed;
        d_i >= slope_i u_i - m u_i^2 / 2, with u_i the change before the cap and m a bound of its second derivative.
        """
        readout, total = self.goal.readout, torch.zeros(len(v), device=v.device)
        m = CURVATURE * slope * slope / cap
        for r, token in enumerate(self.goal.ids):
            before, moved = self.z[n, r], readout.norm(v)[:, r]
            y = readout.finish(before)
            if self.goal.rival is not None:
                d = readout.finish(moved @ readout.weight.float().T + before) - y
                return d[:, 0] - d[:, 1]
            p = y.softmax(-1)
            slopes = slope * (1 - ((y - readout.finish(torch.zeros_like(y))) / cap).square())
            likely = p.topk(min(LIKELY, len(p))).indices
            rest = p.index_fill(0, likely, 0.0)
            squares = readout.head.row_squares
            bend = (moved @ readout.weight[likely].float().T).square() @ p[likely]
            bend += (rest @ squares) * moved.square().sum(-1)
            d_w = readout.finish(before[token] + moved @ readout.weight[token].float()) - y[token]
            total += d_w - moved @ readout.unprojected((p * slopes)[None])[0] + m / 2 * bend
        return total


@dataclass(frozen=True)
class Ranked:
    """The elements that add most.

    Attributes:
        units, scores, bounds, coefficients: [k], best first.
        evaluated: how many were computed exactly. total: how many there are. certified: no other can be among them.
    """

    units: tuple[Unit, ...]
    scores: Tensor
    bounds: Tensor
    coefficients: tuple[float, ...]
    evaluated: int
    total: int
    certified: bool


def top_elements(parts: Parts, goal: Goal, k: int) -> Ranked:
    """The k elements of all groups that add most to the state that their layer reads."""
    states: dict[tuple[int, bool], int] = {}
    for group in parts.groups:
        states.setdefault((group.layer, group.kind == "attn.z"), len(states))
    of_group = [states[g.layer, g.kind == "attn.z"] for g in parts.groups]
    layers = parts.layers
    read = [layers[i].x if attention else layers[i].before_mlp for i, attention in states]
    bases = Baselines(goal, torch.stack(read))
    found = [bases.bounds(n, g) for n, g in zip(of_group, parts.groups, strict=True)]
    sizes = torch.tensor([len(f) for f in found])
    starts = torch.cumsum(sizes, 0) - sizes
    bound = torch.cat(found)

    def group_of(index: Tensor) -> Tensor:
        return torch.bucketize(index.cpu(), starts, right=True) - 1

    def exact(index: Tensor) -> Tensor:
        which = group_of(index)
        vectors = torch.empty(len(index), *parts.final.shape, device=bound.device)
        for g in which.unique().tolist():
            here = (which == g).nonzero().flatten().to(index.device)
            vectors[here] = parts.groups[g].vectors(index[here] - int(starts[g]))
        return bases.added(torch.tensor(of_group)[which], vectors)

    best = _best(bound, exact, k, goal.readout.linear)
    elements = [
        (parts.groups[g], i - int(starts[g]))
        for g, i in zip(group_of(best.index).tolist(), best.index.tolist(), strict=True)
    ]
    return Ranked(
        units=tuple(g.unit(i) for g, i in elements),
        scores=best.score,
        bounds=bound[best.index],
        coefficients=tuple(g.coefficient(i) for g, i in elements),
        evaluated=best.evaluated,
        total=best.total,
        certified=goal.readout.linear,
    )


def _best(bound: Tensor, exact: Callable[[Tensor], Tensor], k: int, bounded: bool) -> TopK:
    if bounded:
        return certified_topk(bound, exact, k)
    tried = bound.topk(min(UNCERTIFIED * k, len(bound))).indices
    scores = torch.cat([exact(part) for part in tried.split(BLOCK)])
    best = scores.topk(min(k, len(tried)))
    return TopK(tried[best.indices], best.values, len(tried), len(bound))


@dataclass(frozen=True)
class LayerScores:
    """Imp of every attention and MLP.

    Attributes:
        units, scores: in the order of the layers.
        total: their sum; in a parallel block, where both read one state, that of their joint scores.
        gained: score of the last state minus that of the first.
    """

    units: tuple[Unit, ...]
    scores: tuple[float, ...]
    total: float
    gained: float


def layer_scores(parts: Parts, goal: Goal) -> LayerScores:
    """What every attention and every MLP adds, from the state that it reads."""
    units: list[Unit] = []
    pairs: list[Tensor] = []
    joint: list[Tensor] = []
    for i, layer in enumerate(parts.layers):
        both = layer.parallel and layer.attn is not None and layer.mlp is not None
        for kind, part, base in (("attn.out", layer.attn, layer.x), ("mlp.out", layer.mlp, layer.before_mlp)):
            if part is not None:
                units.append(Unit(kind, i))
                pairs += [base, base + part]
                joint += [] if both else pairs[-2:]
        if both and layer.attn is not None and layer.mlp is not None:
            joint += [layer.x, layer.x + layer.attn + layer.mlp]

    def gains(states: list[Tensor]) -> list[float]:
        values = torch.cat([goal.of_state(some) for some in torch.stack(states).split(BLOCK)])
        return (values[1::2] - values[::2]).tolist()

    scores = gains(pairs)
    total = sum(gains(joint) if any(layer.parallel for layer in parts.layers) else scores)
    (gained,) = gains([parts.layers[0].x, parts.final])
    return LayerScores(tuple(units), tuple(scores), total, gained)
