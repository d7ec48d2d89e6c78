"""Path patching: what a component brings to the answer through what it writes to another, and through nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cutaway.core.errors import ParameterError
from cutaway.core.method import method
from cutaway.core.params import Count, DrawCount, Image, MetricLike, Positions, Prompts, Sites, Target
from cutaway.core.progress import track
from cutaway.core.proof import Check, Proof
from cutaway.core.site import Items, Site
from cutaway.engine.exchanges import Kept, called, exchanges
from cutaway.engine.patching import Direction, Exchange
from cutaway.engine.paths import Between, Paths, receivers_of
from cutaway.engine.replay import BUDGET, replay
from cutaway.models.handle import Model
from cutaway.ops.draws import prove_sets
from cutaway.ops.means import Ends, means_of, over
from cutaway.ops.watched import rounding
from cutaway.results.grid import Grid

Senders = Literal["heads", "mlps", "heads and mlps", "all"]


@method(
    cites=("wang2023ioi", "goldowskydill2023path"),
    example={
        "clean": "#70 #71 #72 #73",
        "corrupt": "#60 #90 #92 #93",
        "metric": "logit_diff: #11, #22",
        "receivers": "L2.attn.v",
    },
)
def path_patching(
    model: Model,
    clean: Prompts,
    corrupt: Prompts,
    receivers: Sites,
    metric: MetricLike | None = None,
    answers: list[Target] | None = None,
    rivals: list[Target] | None = None,
    senders: Senders = "heads",
    between: Between = "frozen",
    each: bool = False,
    positions: Positions = "all",
    direction: Direction = "clean->corrupt",
    normalise: bool = True,
    clean_image: Image | None = None,
    corrupt_image: Image | None = None,
    draws: DrawCount = Proof.MIN_DRAWS,
    seed: int = 0,
    budget: Count = BUDGET,
) -> Grid:
    """The metric's change when receivers read what a sender would have written in the other run, for every sender.

    A sender (a head, an MLP, the embedding) writes what it wrote in the run that gives. Only the receivers see that:
    their queries, keys, values or MLP inputs are computed again from the changed residual stream, and put into the run
    that receives. All senders run at once, and only what lies between the residual stream and the receivers is computed
    for them. The check takes the strongest path once more, in whole forward passes; the proof patches the paths of the
    strongest senders together, against random senders.

    Of several pairs of prompts come means over pairs with their standard errors. Normalised, that is the mean change
    divided by the mean difference of the runs, so that pairs whose runs hardly differ do not count for more.

    Sources: Wang et al. (2023), "Interpretability in the wild"; Goldowsky-Dill et al. (2023), "Localizing model
    behavior with path patching".

    Args:
        clean: prompts whose answer is right, one or several.
        corrupt: as many prompts, each of the token length of its clean one.
        receivers: where paths end: ``L9.attn.q[6]``, ``L5.attn.k``, ``L3.attn.v[0]@-1``, ``L4.mlp.in``, or
            ``final_norm`` for the logits. Keys and values are named by key-value head.
        metric: what is measured; by default the logit difference between the answers of each pair's two prompts.
        answers: instead of a metric: each pair's own answer, whose log-probability is measured.
        rivals: each pair's own rival, whose logit is then taken off that of the answer.
        senders: where paths start; "all" takes the embedding too.
        between: what happens between sender and receivers. "frozen": nothing, the direct path; "mlps": MLPs are
            computed again, heads are not; "recomputed": everything is, so that all paths to the receivers count.
        each: one cell per pair of sender and receiver, instead of all receivers together.
        positions: where senders are patched.
        direction: which run gives and which receives.
        normalise: divide by the difference of the two runs.
        clean_image: image of the clean prompts.
        corrupt_image: image of the corrupt prompts; the clean one when it is not given.
        draws: random sets of senders in the proof, at least 5; 0 leaves it out.
        seed: of the draws.
        budget: bytes that the replayed rows may take, and what is kept of all pairs.

    Returns:
        change of the metric, as a share of the runs' difference or in its unit: [layer, head], [layer, component], or
        [sender, receiver]; of several pairs the mean. NaN where no path leads from sender to receiver.

    Raises:
        ParameterError: a receiver that is none, no path at all, or both runs give the same value. MismatchError:
        prompts of different token length, naming the row and the tokens, or unequal numbers of prompts. SiteError: a
        receiver that is not there.
    """
    pairs = exchanges(model, clean, corrupt, metric, answers, rivals, direction, (clean_image, corrupt_image))
    ends, *_ = [receivers_of(model, receivers, pair, each) for pair in pairs]
    for pair in pairs:
        pair.prompt.select(positions, "positions")
    starts = _senders(model, pairs[0], senders, None if positions == "all" else positions)
    kept = Kept(lambda i: Paths(model, pairs[i], starts, ends, between), lambda paths: paths.bytes, budget)
    found = [
        _effects(model, pair, kept[i], [(sender,) for sender in starts], each, budget)
        for i, pair in enumerate(track(pairs, "pairs", total=len(pairs)))
    ]
    measure, unit = called(pair.metric for pair in pairs), pairs[0].metric.unit
    both = Ends.of([(one.base, one.given) for one in found], measure, unit)
    if normalise:
        both.require_difference()
    values = torch.stack([one.values for one in found])
    if bool(values.isnan().all()):
        said = f"none of {len(starts)} senders comes before {', '.join(map(str, ends))}"
        raise ParameterError("receivers", said, "name receivers in later layers")

    def effect(sets: list[list[int]]) -> Tensor:
        named = [[starts[i] for i in some] for some in sets]
        each_pair = [_effects(model, pair, kept[i], named, False, budget).values for i, pair in enumerate(pairs)]
        return both.sign * torch.stack(each_pair).mean(0)[:, 0]

    changed = values.mean(0)
    proof = prove_sets(
        effect,
        torch.where(changed.isnan().all(1), float("nan"), changed.nan_to_num(0.0).sum(1)) * both.sign,
        [-1 if sender.kind == "embed" else sender.layer for sender in starts],
        draws,
        seed,
        ablated="patching the strongest paths together",
        metric=measure,
        unit=unit,
        matched="layer",
    )
    shown, error = both.shares(values) if normalise else over(values)
    axes, grid, labels = _laid_out(starts, ends, shown, each)
    said = ", ".join(map(str, ends[:4])) + (f" and {len(ends) - 4} more" if len(ends) > 4 else "")
    return Grid(
        title=f"paths from {senders} to {said}, patched {direction} in {model.name}{means_of(len(pairs))}",
        values=grid,
        standard_error=None if error is None else _laid_out(starts, ends, error, each)[1],
        axes=axes,
        measure="share of the answer that the path brings" if normalise else f"change of {measure}",
        unit="1 = the run that gives" if normalise else unit,
        labels=labels,
        check=_check(model, pairs, kept, ends, found, each),
        proof=proof,
        notes=(
            *both.notes(),
            f"in between: {between}; {' or '.join(dict.fromkeys(one.how for one in found))}",
            *(["no proof: no path promises anything, or there are too few"] if draws and proof is None else []),
        ),
    )


def _senders(model: Model, exchange: Exchange, which: Senders, positions: Items | str | None) -> list[Site]:
    """Every sender of the kinds named, layer by layer."""
    found = [Site("embed", positions=positions)] if which == "all" else []
    for i, layer in enumerate(model.anatomy(exchange.receiver).stacks[""]):
        if which != "mlps" and layer.has("attn.z") and layer.attention is not None:
            whole = Site("attn.z", Items.of(i), positions=positions)
            found += [whole.at(index=h) for h in range(layer.attention.heads)]
        if which != "heads" and layer.has("mlp.out"):
            found.append(Site("mlp.out", Items.of(i), positions=positions))
    if not found:
        kind = Site("attn.z" if which == "heads" else "mlp.out")
        model.expand(kind, exchange.receiver)
    return found


@dataclass(frozen=True)
class _Effects:
    """What sets of senders change in one pair.

    Attributes:
        values: [set, receiver] change of the metric, all receivers as one unless asked for each; NaN without a path.
        base, given: the metric in the run that receives and in the one that gives.
        how: what computed the receivers, and then the metric.
    """

    values: Tensor
    base: float
    given: float
    how: str


def _effects(
    model: Model, exchange: Exchange, paths: Paths, sets: Sequence[Sequence[Site]], each: bool, budget: int
) -> _Effects:
    changes = paths.changes(sets)
    rows = [[one] for row in changes for one in row] if each else changes
    runs = [[one for one in row if one is not None] for row in rows]
    live = [i for i, run in enumerate(runs) if run]
    found = replay(model, exchange.prompt, [runs[i] for i in live], exchange.metric, budget=budget, base=paths.base)
    base = float(found.base)
    values = torch.full((len(runs),), float("nan"), dtype=torch.float64)
    values[live] = found.values.double() - base
    return _Effects(values.view(len(sets), -1), base, paths.given, f"receivers by {paths.how}; then {found.how}")


def _laid_out(
    starts: Sequence[Site], ends: Sequence[Site], values: Tensor, each: bool
) -> tuple[tuple[str, str], Tensor, dict[str, tuple[str | int | float, ...]]]:
    """(axes, values, labels) of the grid: sender x receiver, or layer x component."""
    if each:
        names = tuple(str(s.whole().at(index=s.index)) for s in starts)
        return ("sender", "receiver"), values, {"sender": names, "receiver": tuple(map(str, ends))}
    layers = sorted({0 if s.kind == "embed" else s.layer for s in starts})
    places = [(0 if s.kind == "embed" else s.layer, _component(s)) for s in starts]
    heads = sorted({c for _, c in places if isinstance(c, int)})
    columns: list[str | int] = [*heads, *(w for w in ("mlp", "embed") if any(c == w for _, c in places))]
    grid = torch.full((len(layers), len(columns)), float("nan"), dtype=torch.float64)
    for (layer, component), value in zip(places, values[:, 0], strict=True):
        grid[layers.index(layer), columns.index(component)] = value
    axis = "head" if len(columns) == len(heads) else "component"
    return ("layer", axis), grid, {"layer": tuple(layers), axis: tuple(columns)}


def _component(sender: Site) -> str | int:
    if sender.index is not None:
        return sender.index[0][0]
    return "embed" if sender.kind == "embed" else "mlp"


def _check(
    model: Model,
    pairs: Sequence[Exchange],
    kept: Kept[Paths],
    ends: Sequence[Site],
    found: Sequence[_Effects],
    each: bool,
) -> Check:
    """The strongest path once more in every pair: the receivers from whole layers, the metric from a whole pass."""
    mean = torch.stack([one.values for one in found]).mean(0).nan_to_num(0.0)
    row, column = divmod(int(mean.abs().argmax()), mean.shape[1])
    sender, chosen = kept[0].senders[row], [ends[column]] if each else ends
    errors = []
    for i, (pair, one) in enumerate(zip(pairs, found, strict=True)):
        paths = kept[i]
        again = Paths(model, pair, [sender], chosen, paths.between, rows=True, gives=paths.gives, gets=paths.base)
        do = [c for c in again.changes([(sender,)])[0] if c is not None]
        value = pair.scored(model.trace(pair.receiver, do=do).logits, pair.receiver)
        errors.append(value - one.base - float(one.values[row, column]))
    return Check(
        name=f"the strongest path, from {sender}, in whole forward passes",
        value=max(errors, key=abs),
        tolerance=rounding(model.dtype) * max(1.0, *(abs(end) for one in found for end in (one.base, one.given))),
    )
