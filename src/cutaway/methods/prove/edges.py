"""Edge attribution patching: which connections between components carry an answer, to first order, and the proof."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import annotated_types
import numpy as np
import torch

from cutaway.core.method import method
from cutaway.core.params import Count, Image, MetricLike, Prompts, Target
from cutaway.core.proof import Check, Proof
from cutaway.models.handle import Model
from cutaway.ops.circuit_runs import CircuitRuns
from cutaway.ops.draws import different, sizes
from cutaway.ops.edge_scores import BUDGET, EdgeScores, edge_scores, path_points
from cutaway.ops.fronts import read_fronts
from cutaway.ops.pairs import Pairs, paired
from cutaway.ops.selection import EdgeDraws, mask, ranked
from cutaway.ops.senders import Senders
from cutaway.ops.stats import POOR, missed, rank_correlation
from cutaway.ops.wiring import Wiring
from cutaway.results.graph import Graph

MOST = 100  # edges in the largest set of the proof
SHARE = 4  # a set of the proof holds at most this part of all edges, so that random ones differ
TOLERANCE = 1e-3


@method(
    cites=("hanna2024eapig", "syed2023eap"),
    example={"clean": "#5 #9 #6 #7", "corrupt": "#15 #4 #60 #70", "metric": "logit_diff: #11, #22", "steps": "2"},
)
def edges(
    model: Model,
    clean: Prompts,
    corrupt: Prompts | None = None,
    metric: MetricLike | None = None,
    answers: list[Target] | None = None,
    rivals: list[Target] | None = None,
    steps: Count = 5,
    norms: Literal["moving", "frozen"] = "moving",
    reference: Prompts | None = None,
    clean_image: Image | None = None,
    corrupt_image: Image | None = None,
    verify: Annotated[int, annotated_types.Ge(0)] = 10,
    draws: Annotated[int, annotated_types.Ge(Proof.MIN_DRAWS)] = 5,
    seed: int = 0,
    budget: Count = BUDGET,
) -> Graph:
    """How much the metric would change if one connection between components carried the corrupt run, for every one.

    Connections lead from the embedding, heads and MLPs to the queries, keys and values of heads, to MLPs and to the
    logits. The score is first order: the sender's change times the gradient at the one receiver, averaged over
    ``steps`` points between the corrupt and the clean embedding (integrated gradients); one step takes the gradient
    of the clean run. The strongest edges are recomputed by intervening, and corrupting them is compared with random
    ones.

    Source: Hanna, Pezzelle and Belinkov (2024), "Have faith in faithfulness"; Syed, Rager and Conmy (2023),
    "Attribution patching outperforms automated circuit discovery".

    Args:
        clean: prompts whose answer is right.
        corrupt: as many prompts, each of the token length of its clean one; without them what is taken away becomes
            its mean over tokens.
        metric: what is measured in every prompt, e.g. ``logit_diff: #11, #22``.
        answers: instead of a metric: each prompt's own answer, whose log-probability is measured.
        rivals: each prompt's own rival, whose logit is then taken off that of the answer.
        steps: points at which gradients are taken: 1 is EAP, more are EAP-IG.
        norms: whether an edge also counts for how it moves the scale of its receiver's norm, or only for what it adds.
        reference: prompts over whose tokens means are taken; the clean ones when none are given.
        clean_image: image of the clean prompt.
        corrupt_image: image of the corrupt prompt; the clean one when it is not given.
        verify: how many of the strongest edges are recomputed exactly, one intervention each.
        draws: random sets that the proof compares with, at least 5.
        seed: of the draws.
        budget: bytes that the senders' changes of some pairs may take; more pairs are taken one after the other.

    Returns:
        every edge with its score, mean over pairs; negative where the edge supports the answer.

    Raises:
        MismatchError: prompts of unequal length, naming the tokens. ParameterError: neither or both of metric and
        answers. TokenError: a token that the vocabulary lacks. UnsupportedError: a layer that does not add heads and
        an MLP to the residual stream, or means where the stream itself is normed.
    """
    pairs = paired(model, clean, corrupt, metric, answers, rivals, (clean_image, corrupt_image))
    wiring = Wiring.of_model(model, pairs.clean)
    fronts = read_fronts(model, pairs.clean, wiring)
    senders = Senders(model, wiring, None if reference is None else model.inputs(reference))
    found = edge_scores(model, pairs, wiring, fronts, path_points(steps), budget, senders)
    sender, receiver = wiring.edges
    matrix = found.scores if norms == "moving" else found.scores - found.scale
    scores = matrix.cpu().numpy()[sender, receiver].astype(np.float64)
    order = ranked(np.abs(scores))
    runs = CircuitRuns(model, pairs, wiring, fronts, senders)
    source, target, into = wiring.ends
    columns: dict[str, Any] = {"into": into}
    complete = pairs.corrupt is not None and found.missing is None
    notes = [_values(pairs, found), *([_completeness(found)] if complete else [])]
    if verify:
        exact = _exact(runs, wiring, order[:verify])
        columns["exact"] = np.full(len(scores), np.nan)
        columns["exact"][order[:verify]] = exact
        between = float((found.corrupt - found.clean).mean())
        notes.append(_agreement(torch.as_tensor(scores[order[:verify]]), torch.as_tensor(exact), between))
    if wiring.heads != wiring.kv_heads:
        notes.append("keys and values that several heads share are nodes of their own")
    return Graph(
        title=f"Edges of {model.name}, {'EAP' if steps == 1 else f'EAP-IG with {steps} steps'}",
        nodes=wiring.nodes,
        source=source,
        target=target,
        weight=scores,
        layer=wiring.heights,
        edge_columns=columns,
        measure="effect of corrupting the edge",
        unit=pairs.measure.unit,
        about=about(model, pairs, wiring),
        check=_check(found, model),
        proof=_proof(runs, wiring, order, draws, seed) if draws else None,
        notes=tuple(notes),
    )


def about(model: Model, pairs: Pairs, wiring: Wiring) -> dict[str, Any]:
    """What the readers of a graph need to know of the model and the first prompt."""
    tokens = [pairs.clean.tokens[0][p] for p in pairs.clean.real[0]]
    return {**wiring.sizes, "d_model": model.layers[0].d_model, "model": model.name, "tokens": tokens}


def _values(pairs: Pairs, found: EdgeScores) -> str:
    gone = "in the corrupt one" if pairs.corrupt is not None else "with means in place of everything"
    mean = f", means of {len(pairs)} prompts" if len(pairs) > 1 else ""
    values = f"{float(found.clean.mean()):.4g} in the clean run, {float(found.corrupt.mean()):.4g} {gone}"
    return f"{pairs.measure}: {values} ({pairs.measure.unit}{mean})"


def _completeness(found: EdgeScores) -> str:
    total = float((found.corrupt - found.clean).mean())
    return f"the edges out of the embedding sum to {float(found.scores[0].sum()):.4g} of the change of {total:.4g}"


def _check(found: EdgeScores, model: Model) -> Check:
    tolerance = max(TOLERANCE, 16 * torch.finfo(model.dtype).eps)
    name = "edges out of the embedding sum to the effect of its own gradient"
    if found.missing is not None:
        name = "what is written, carried through the norms of the stream, sums to the last of it"
    return Check(name=name, value=found.error, tolerance=tolerance)


def _exact(runs: CircuitRuns, wiring: Wiring, chosen: np.ndarray) -> np.ndarray:
    """[edge] the change of the metric when each of these edges alone carries the corrupt run."""
    whole = torch.as_tensor(wiring.real)
    values = runs(torch.stack([whole & ~mask(wiring, np.array([e])) for e in chosen]))
    return np.asarray((values - runs.clean).mean(1).double().numpy())


def _agreement(scores: torch.Tensor, exact: torch.Tensor, between: float) -> str:
    said = f"the {len(exact)} strongest edges recomputed exactly: largest difference {(scores - exact).abs().max():.2g}"
    if len(exact) > 2:
        said += f", rank correlation {rank_correlation(scores, exact):.2f}"
    part = missed(scores, exact, between)
    if part <= POOR:
        return said
    poor = f"missing {part:.0%} of the largest effect is poor, so go by their column 'exact'"
    return f"{said}; {poor}; the page of edges says where estimates fail"


def _proof(runs: CircuitRuns, wiring: Wiring, order: np.ndarray, draws: int, seed: int) -> Proof:
    """What corrupting the first k edges takes from the metric, against as many others of the same profile."""
    ks = sizes(max(1, min(MOST, len(wiring) // SHARE)))
    drawer = EdgeDraws(wiring, seed)
    random = [drawer.draw(order[:k], others=True) for _ in range(draws) for k in ks]
    sets = [order[:k] for k in ks] + random
    whole = torch.as_tensor(wiring.real)
    values = runs(torch.stack([whole & ~mask(wiring, some) for some in sets])).double()
    base, gone = runs.clean.double(), runs.corrupt.double()
    drop = (base - values).mean(1) * (1.0 if float((base - gone).mean()) >= 0 else -1.0)
    return Proof(
        ablated="corrupting the strongest edges",
        ks=tuple(ks),
        effect=drop[: len(ks)].numpy(),
        random=drop[len(ks) :].view(draws, len(ks)).numpy(),
        metric=str(runs.pairs.measure),
        unit=runs.pairs.measure.unit,
        matched="layer and kind of sender and receiver",
        distinct=different(random[len(ks) - 1 :: len(ks)]),
    )
