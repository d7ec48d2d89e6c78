"""Faithfulness: does the circuit do what the model does, and does the model still do it without the circuit?"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import annotated_types
import numpy as np
import torch

from cutaway.core.errors import MismatchError, ParameterError, ResultError
from cutaway.core.method import method
from cutaway.core.params import Count, Fraction, Image, MetricLike, Prompts, Target
from cutaway.core.proof import Check, Proof
from cutaway.models.handle import Model
from cutaway.ops.areas import FRACTIONS, cmd, cpr
from cutaway.ops.circuit_runs import CircuitRuns, plain_values
from cutaway.ops.draws import different
from cutaway.ops.edge_scores import edge_scores, path_points
from cutaway.ops.fronts import read_fronts
from cutaway.ops.pairs import paired
from cutaway.ops.selection import EdgeDraws, mask, pruned
from cutaway.ops.senders import Senders
from cutaway.ops.wiring import Wiring
from cutaway.results.circuit import choose, places
from cutaway.results.graph import Graph
from cutaway.results.series import Series

LINES = (
    "only the circuit",
    "only random edges",
    "without the circuit",
    "without random edges",
    "least that one of its edges matters",
)
PROVED_AT = 0.1  # of all edges: larger circuits share too much with random ones for the proof


@method(
    cites=("mueller2025mib", "hanna2024eapig", "wang2023ioi"),
    example={"clean": "#5 #9 #6 #7", "corrupt": "#15 #4 #60 #70", "metric": "logit_diff: #11, #22", "steps": "2"},
)
def faithfulness(
    model: Model,
    clean: Prompts,
    corrupt: Prompts | None = None,
    metric: MetricLike | None = None,
    answers: list[Target] | None = None,
    rivals: list[Target] | None = None,
    graph: Graph | None = None,
    how: Literal["top", "greedy"] = "top",
    by: Literal["size", "support"] = "size",
    fractions: list[Fraction] | None = None,
    steps: Count = 5,
    norms: Literal["moving", "frozen"] = "moving",
    reference: Prompts | None = None,
    clean_image: Image | None = None,
    corrupt_image: Image | None = None,
    minimality: Annotated[int, annotated_types.Ge(0)] = 10,
    draws: Annotated[int, annotated_types.Ge(Proof.MIN_DRAWS)] = 5,
    seed: int = 0,
) -> Series:
    """How much of the metric circuits of growing size keep when only they run, and what is left without them.

    Only the circuit: every component reads the circuit's edges as they are in this run, and all else as it is in the
    corrupt run (or its mean). Without the circuit: the other way round. 1 is the whole model, 0 nothing of it. Random
    edges are as many, from the same layers and kinds of sender into the same layers and kinds of receiver.

    Source: Mueller et al. (2025), "MIB: a mechanistic interpretability benchmark"; Wang et al. (2023),
    "Interpretability in the wild" (completeness and minimality).

    Args:
        clean: prompts whose answer is right.
        corrupt: as many prompts, each of the token length of its clean one; without them means over tokens stand in.
        metric: what is measured in every prompt, e.g. ``logit_diff: #11, #22``.
        answers: instead of a metric: each prompt's own answer, whose log-probability is measured.
        rivals: each prompt's own rival, whose logit is then taken off that of the answer.
        graph: scored edges, or a circuit; found here, on the same prompts, when none is given.
        how: circuits are the strongest edges, or grow from the logits backwards.
        by: strength is the size of the score, or how much corrupting the edge lowers the metric.
        fractions: sizes of the circuits as shares of all edges; those of MIB when none are given.
        steps: of integrated gradients, where the edges are found here.
        norms: as in ``edges``, where the edges are found here.
        reference: prompts over whose tokens means are taken; the clean ones when none are given.
        clean_image: image of the clean prompt.
        corrupt_image: image of the corrupt prompt; the clean one when it is not given.
        minimality: how many of a circuit's weakest edges are taken out one by one.
        draws: random circuits per size, at least 5.
        seed: of the draws.

    Returns:
        shares [line, fraction]; of random edges the mean with the smallest and largest. ``line_columns``: CPR and CMD
        of the first two lines.

    Raises:
        MismatchError: prompts of unequal length, or a graph of another model. ParameterError: both runs measure alike.
        ResultError: no path leads through the graph.
    """
    pairs = paired(model, clean, corrupt, metric, answers, rivals, (clean_image, corrupt_image))
    wiring = Wiring.of_model(model, pairs.clean)
    fronts = read_fronts(model, pairs.clean, wiring)
    senders = Senders(model, wiring, None if reference is None else model.inputs(reference))
    edges, weights = _scored(model, graph, wiring)
    if graph is None:
        found = edge_scores(model, pairs, wiring, fronts, path_points(steps), senders=senders)
        sender, receiver = wiring.edges
        matrix = found.scores if norms == "moving" else found.scores - found.scale
        weights = matrix.cpu().numpy()[sender, receiver].astype(np.float64)
    runs = CircuitRuns(model, pairs, wiring, fronts, senders)
    shares = _Shares(runs)
    sizes = np.array(sorted(set(fractions or FRACTIONS)))
    if sizes[0] <= 0:
        raise ParameterError("fractions", f"{sizes[0]:g} is among them", "give shares above 0")
    counts = [min(int(fraction * len(wiring)), len(edges)) for fraction in sizes]
    circuits = [pruned(wiring, choose(wiring, edges, weights, how, n=k, by=by)) for k in counts]
    drawer = EdgeDraws(wiring, seed)
    random = [[drawer.draw(some, others=False) for some in circuits] for _ in range(draws)]
    kept, gone = shares(circuits), shares(circuits, without=True)
    kept_random, gone_random = (
        np.stack([shares(some, without=without) for some in random]) for without in (False, True)
    )
    y = np.stack([kept, kept_random.mean(0), gone, gone_random.mean(0), _least(shares, circuits, kept, minimality)])
    lo, hi = np.full_like(y, np.nan), np.full_like(y, np.nan)
    for line, values in ((1, kept_random), (3, gone_random)):
        lo[line], hi[line] = values.min(0), values.max(0)
    lines = len(LINES) if minimality else len(LINES) - 1
    areas = {name: np.full(lines, np.nan) for name in ("CPR", "CMD")}
    for line in (0, 1):  # areas are of what circuits keep
        areas["CPR"][line], areas["CMD"][line] = cpr(sizes, y[line]), cmd(sizes, y[line])
    return Series(
        title=f"Circuits of {model.name}: {pairs.measure}",
        x=sizes,
        y=y[:lines],
        lo=lo[:lines],
        hi=hi[:lines],
        x_name="edges kept",
        x_unit="share of all",
        measure="share of what the model does",
        log_x=True,
        interval=f"smallest and largest of {draws} draws of random edges",
        labels={"line": LINES[:lines]},
        line_columns=areas,
        about={"edges": tuple(len(some) for some in circuits), "all_edges": len(wiring)},
        check=_check(runs),
        proof=_proof(sizes, counts, kept, kept_random, random),
        notes=_notes(runs, areas, sizes, circuits, kept),
    )


def _scored(model: Model, graph: Graph | None, wiring: Wiring) -> tuple[np.ndarray, Any]:
    """(which edges of the model have scores, the scores)."""
    if graph is None:
        return np.arange(len(wiring)), None
    if tuple(graph.nodes) != wiring.nodes:
        asked = f"a circuit in {model.name}"
        heads = sum(".attn.z[" in node for node in graph.nodes)
        layers = sum(node.endswith(".mlp.out") for node in graph.nodes)
        found = f"graph {graph.title!r} is of a model with {layers} layers and {heads} heads in all"
        raise MismatchError(asked, found, f"this one has {wiring}")
    edges = places(graph, wiring)
    if not len(pruned(wiring, edges)):
        found = f"none of its {len(edges)} edges lies on a path from the embedding to the logits"
        raise ResultError(f"the circuits of graph {graph.title!r}", found, "give one with a path")
    return edges, graph.weight


class _Shares:
    """What circuits keep of the difference between the clean run and the one with everything replaced."""

    def __init__(self, runs: CircuitRuns) -> None:
        self.runs = runs
        self.base, self.whole = float(runs.corrupt.mean()), float(runs.clean.mean())
        if abs(self.whole - self.base) < 1e-6:
            found = f"both the clean run and the one with everything replaced give {self.base:.6g}"
            raise ParameterError(f"metric '{runs.pairs.measure}'", found, "choose prompts that differ in it")

    def __call__(self, circuits: list[np.ndarray], without: bool = False) -> np.ndarray:
        """[circuit] shares when only these edges carry the run, or all but these."""
        if not circuits:
            return np.empty(0)
        whole = torch.as_tensor(self.runs.wiring.real)
        masks = torch.stack([mask(self.runs.wiring, some) for some in circuits])
        values = self.runs(whole & ~masks if without else masks).double().mean(1).numpy()
        return np.asarray((values - self.base) / (self.whole - self.base))


def _least(shares: _Shares, circuits: list[np.ndarray], kept: np.ndarray, most: int) -> np.ndarray:
    """[size] the smallest change of the share when one of a circuit's weakest edges is taken out; NaN without edges."""
    found = np.full(len(circuits), np.nan)
    for i, some in enumerate(circuits):
        tried = range(max(0, len(some) - most), len(some))
        changes = np.abs(shares([np.delete(some, j) for j in tried]) - kept[i])
        found[i] = changes.min() if len(changes) else np.nan
    return found


def _check(runs: CircuitRuns) -> Check:
    """A run in which every edge is replaced is the corrupt run."""
    plain = plain_values(runs)
    size = max(1.0, float(runs.clean.abs().max()))
    error = float((torch.stack([runs.clean, runs.corrupt]) - plain).abs().max()) / size
    tolerance = max(1e-4, 16 * torch.finfo(runs.model.dtype).eps)
    return Check(name="all edges give the clean run, none the replaced one", value=error, tolerance=tolerance)


def _proof(
    sizes: np.ndarray, counts: list[int], kept: np.ndarray, kept_random: np.ndarray, random: list[list[np.ndarray]]
) -> Proof | None:
    """Only the circuit against only random edges, at the sizes up to a tenth of all edges."""
    at = {k: i for i, k in reversed(list(enumerate(counts))) if k > 0 and sizes[i] <= PROVED_AT}
    at = at or {k: i for i, k in enumerate(counts) if k > 0}
    ks = sorted(at)
    if not ks:
        return None
    index = [at[k] for k in ks]
    return Proof(
        ablated="running only the strongest edges",
        ks=tuple(ks),
        effect=kept[index],
        random=kept_random[:, index],
        metric="the share of what the model does",
        unit="of it",
        matched="layer and kind of sender and receiver",
        distinct=different(some[index[-1]] for some in random),
    )


def _notes(
    runs: CircuitRuns, areas: dict[str, np.ndarray], sizes: np.ndarray, circuits: list[np.ndarray], kept: np.ndarray
) -> tuple[str, ...]:
    unit = runs.pairs.measure.unit
    gone = "in the corrupt run" if runs.pairs.corrupt is not None else "with means in place of everything"
    listed = ", ".join(f"{len(c)} ({s:g}): {k:.3g}" for c, s, k in zip(circuits, sizes, kept, strict=True))
    return (
        f"{runs.pairs.measure}: {float(runs.clean.mean()):.4g} in the clean run, {float(runs.corrupt.mean()):.4g} "
        f"{gone} ({unit})",
        f"CPR {areas['CPR'][0]:.4g}, CMD {areas['CMD'][0]:.4g} over shares {sizes[0]:g} to {sizes[-1]:g}",
        f"edges without dead ends, of {len(runs.wiring):,} (share asked): what only they keep: {listed}",
    )
