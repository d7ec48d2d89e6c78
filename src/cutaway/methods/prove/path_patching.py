"""Path patching: what a component brings to the answer through what it writes to another, and through nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cutaway.core.errors import ParameterError
from cutaway.core.intervention import Intervention
from cutaway.core.method import method
from cutaway.core.params import Count, DrawCount, Image, MetricLike, Positions, Prompt, Sites
from cutaway.core.proof import Check, Proof
from cutaway.core.site import Items, Site
from cutaway.engine.patching import Direction, Exchange
from cutaway.engine.paths import Between, Paths, receivers_of
from cutaway.engine.replay import BUDGET, replay
from cutaway.models.handle import Model
from cutaway.ops.draws import prove_sets
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
    clean: Prompt,
    corrupt: Prompt,
    receivers: Sites,
    metric: MetricLike | None = None,
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

    Sources: Wang et al. (2023), "Interpretability in the wild"; Goldowsky-Dill et al. (2023), "Localizing model
    behavior with path patching".

    Args:
        clean: text or ids of the prompt whose answer is right.
        corrupt: text or ids of equal token length.
        receivers: where paths end: ``L9.attn.q[6]``, ``L5.attn.k``, ``L3.attn.v[0]@-1``, ``L4.mlp.in``, or
            ``final_norm`` for the logits. Keys and values are named by key-value head.
        metric: what is measured; by default the logit difference between the answers of the two prompts.
        senders: where paths start; "all" takes the embedding too.
        between: what happens between sender and receivers. "frozen": nothing, the direct path; "mlps": MLPs are
            computed again, heads are not; "recomputed": everything is, so that all paths to the receivers count.
        each: one cell per pair of sender and receiver, instead of all receivers together.
        positions: where senders are patched.
        direction: which run gives and which receives.
        normalise: divide by the difference of the two runs.
        clean_image: image of the clean prompt.
        corrupt_image: image of the corrupt prompt; the clean one when it is not given.
        draws: random sets of senders in the proof, at least 5; 0 leaves it out.
        seed: of the draws.
        budget: bytes that the replayed rows may take.

    Returns:
        change of the metric, as a share of the runs' difference or in its unit: [layer, head], [layer, component], or
        [sender, receiver]. NaN where no path leads from sender to receiver.

    Raises:
        ParameterError: a receiver that is none, no path at all, or both runs give the same value. MismatchError:
        prompts of different token length, naming the tokens. SiteError: a receiver that is not there.
    """
    exchange = Exchange.of(model, clean, corrupt, metric, direction, (clean_image, corrupt_image))
    ends = receivers_of(model, receivers, exchange, each)
    exchange.prompt.select(positions, "positions")
    starts = _senders(model, exchange, senders, None if positions == "all" else positions)
    paths = Paths(model, exchange, starts, ends, between)
    changes = paths.changes([(sender,) for sender in starts])
    runs = [[[c] for c in row] if each else [[c for c in row if c is not None]] for row in changes]
    flat = [[c for c in run if c is not None] for row in runs for run in row]
    values, base, how = _effects(model, exchange, flat, budget, paths)
    between_runs = paths.given - base
    if normalise and abs(between_runs) < 1e-6:
        said, hint = f"both runs give {base:.6g}", "choose prompts that differ in it, or normalise=False"
        raise ParameterError(f"metric '{exchange.metric}'", said, hint)
    if bool(values.isnan().all()):
        found = f"none of {len(starts)} senders comes before {', '.join(map(str, ends))}"
        raise ParameterError("receivers", found, "name receivers in later layers")
    sign = 1 if between_runs >= 0 else -1
    total = values.view(len(starts), -1).nan_to_num(0.0).sum(1)
    reached = ~values.view(len(starts), -1).isnan().all(1)
    proof = _proof(
        model, exchange, paths, torch.where(reached, total, float("nan")) * sign, base, sign, draws, seed, budget
    )
    shown = values / between_runs if normalise else values
    axes, grid, labels = _laid_out(starts, ends, shown.view(len(starts), -1), each)
    unit = exchange.metric.unit
    named = ", ".join(map(str, ends[:4])) + (f" and {len(ends) - 4} more" if len(ends) > 4 else "")
    return Grid(
        title=f"paths from {senders} to {named}, patched {direction} in {model.name}",
        values=grid,
        axes=axes,
        measure="share of the answer that the path brings" if normalise else f"change of {exchange.metric}",
        unit="1 = the run that gives" if normalise else unit,
        labels=labels,
        check=_check(model, exchange, paths, starts, ends, values.view(len(starts), -1), base, each),
        proof=proof,
        notes=(
            f"{exchange.metric}: {base:.6g} in the run that receives, {paths.given:.6g} in the run that gives ({unit})",
            f"in between: {between}; receivers by {paths.how}; then {how}",
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


def _effects(
    model: Model, exchange: Exchange, runs: Sequence[Sequence[Intervention]], budget: int, paths: Paths
) -> tuple[Tensor, float, str]:
    """([run] change of the metric, NaN for runs that do nothing; the metric without them; how they ran)."""
    values = torch.full((len(runs),), float("nan"), dtype=torch.float64)
    live = [i for i, run in enumerate(runs) if run]
    sweep = [list(runs[i]) for i in live]
    found = replay(model, exchange.prompt, sweep, exchange.metric, budget=budget, base=paths.base)
    base = float(found.base)
    values[live] = found.values.double().cpu() - base
    return values, base, found.how


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
    exchange: Exchange,
    paths: Paths,
    starts: Sequence[Site],
    ends: Sequence[Site],
    values: Tensor,
    base: float,
    each: bool,
) -> Check:
    """The strongest path once more: the receivers from whole layers, the metric from a whole pass."""
    row, column = divmod(int(values.nan_to_num(0.0).abs().argmax()), values.shape[1])
    chosen = [ends[column]] if each else ends
    again = Paths(model, exchange, [starts[row]], chosen, paths.between, rows=True, gives=paths.gives)
    do = [c for c in again.changes([(starts[row],)])[0] if c is not None]
    value = exchange.scored(model.trace(exchange.receiver, do=do).logits, exchange.receiver)
    return Check(
        name=f"the strongest path, from {starts[row]}, in whole forward passes",
        value=value - base - float(values[row, column]),
        tolerance=rounding(model.dtype) * max(1.0, abs(base), abs(paths.given)),
    )


def _proof(
    model: Model,
    exchange: Exchange,
    paths: Paths,
    promised: Tensor,
    base: float,
    sign: int,
    draws: int,
    seed: int,
    budget: int,
) -> Proof | None:
    def effect(sets: list[list[int]]) -> Tensor:
        changes = paths.changes([[paths.senders[i] for i in some] for some in sets])
        runs = [[c for c in row if c is not None] for row in changes]
        return sign * _effects(model, exchange, runs, budget, paths)[0]

    return prove_sets(
        effect,
        promised,
        [-1 if s.kind == "embed" else s.layer for s in paths.senders],
        draws,
        seed,
        ablated="patching the strongest paths together",
        metric=str(exchange.metric),
        unit=exchange.metric.unit,
        matched="layer",
    )
