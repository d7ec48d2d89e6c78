"""Edge scores and circuits against the same written out plainly: one input per receiver, hooks by hand."""

from __future__ import annotations

import random

import pytest
import torch

from cutaway import catalog
from cutaway.ops.circuit_runs import CircuitRuns
from cutaway.ops.edge_scores import edge_scores, path_points
from cutaway.ops.fronts import read_fronts
from cutaway.ops.pairs import Pairs
from cutaway.ops.selection import mask
from cutaway.ops.wiring import Wiring
from tests.architectures import double, model
from tests.equivalence import edge_reference as reference

CLEAN = torch.tensor([[70, 71, 72, 73, 74, 75], [80, 81, 82, 83, 84, 85]])
CORRUPT = torch.tensor([[70, 90, 72, 93, 74, 75], [80, 81, 95, 83, 84, 11]])
FAMILIES = pytest.mark.parametrize("name", list(reference.MODELS))


def measure(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 11] - logits[:, 22]


def ready(name: str):  # type: ignore[no-untyped-def]
    of = double(name)
    pairs = Pairs.of(of.inputs(CLEAN), of.inputs(CORRUPT), of.metric("logit_diff: #11, #22"))
    wiring = Wiring.of_model(of, pairs.clean)
    return of, pairs, wiring, read_fronts(of, pairs.clean, wiring)


def named(wiring: Wiring) -> list[tuple[str, str, str]]:
    source, target, into = wiring.ends
    return [(wiring.nodes[a], wiring.nodes[b], c) for a, b, c in zip(source, target, into, strict=True)]


@FAMILIES
@pytest.mark.parametrize("steps", [1, 4])
def test_scores_are_those_of_the_formula(name: str, steps: int) -> None:
    of, pairs, wiring, fronts = ready(name)
    found = edge_scores(of, pairs, wiring, fronts, path_points(steps))
    expected = reference.eap_ig(name, of.hf, CLEAN, CORRUPT, measure, path_points(steps))
    assert set(expected) == set(named(wiring))
    sender, receiver = wiring.edges
    ours = found.scores[sender, receiver].double()
    theirs = torch.tensor([expected[edge] for edge in named(wiring)], dtype=torch.float64)
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())
    assert found.error < 1e-5


@FAMILIES
def test_pairs_in_chunks_score_as_pairs_together(name: str) -> None:
    of, pairs, wiring, fronts = ready(name)
    together = edge_scores(of, pairs, wiring, fronts, path_points(2))
    apart = edge_scores(of, pairs, wiring, fronts, path_points(2), budget=1)
    torch.testing.assert_close(together.scores, apart.scores, rtol=1e-4, atol=1e-6)


@FAMILIES
@pytest.mark.parametrize("replaced_by", ["corrupt", "mean"])
def test_circuits_run_as_written_out(name: str, replaced_by: str) -> None:
    of, pairs, wiring, fronts = ready(name)
    outs = reference.outputs(name, of.hf, CORRUPT if replaced_by == "corrupt" else CLEAN)
    if replaced_by == "mean":
        pairs = Pairs.of(pairs.clean, None, pairs.measure.metric)
        outs = {sender: out.mean((0, 1), keepdim=True) for sender, out in outs.items()}
    runs = CircuitRuns(of, pairs, wiring, fronts)
    drawn = random.Random(0)
    edges = named(wiring)
    sets = [[i for i in range(len(edges)) if drawn.random() < share] for share in (0.0, 0.3, 0.6, 0.9, 1.0)]
    found = runs(torch.stack([mask(wiring, torch.tensor(some, dtype=torch.long).numpy()) for some in sets]))
    for some, value in zip(sets, found, strict=True):
        expected = measure(reference.circuit(name, of.hf, CLEAN, outs, {edges[i] for i in some}))
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@FAMILIES
def test_few_circuits_at_a_time_run_as_all_together(name: str) -> None:
    of, pairs, wiring, fronts = ready(name)
    keep = torch.rand(5, *wiring.real.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    together = CircuitRuns(of, pairs, wiring, fronts)(keep)
    torch.testing.assert_close(CircuitRuns(of, pairs, wiring, fronts, budget=1)(keep), together)


@pytest.mark.parametrize("name", ["dense", "grouped-query", "parallel"])
@pytest.mark.parametrize("receiver", ["L2.attn.v[0]", "L1.attn.q[2]", "L2.mlp.in"])
def test_one_corrupt_edge_is_a_patched_path(name: str, receiver: str) -> None:
    of = model(name)
    given = {"clean": CLEAN[:1].tolist()[0], "corrupt": CORRUPT[:1].tolist()[0], "metric": "logit_diff: #11, #22"}
    grid = catalog.run("path_patching", of, **given, receivers=receiver, direction="corrupt->clean", normalise=False)
    pairs = Pairs.of(of.inputs(CLEAN[:1]), of.inputs(CORRUPT[:1]), of.metric(given["metric"]))
    wiring = Wiring.of_model(of, pairs.clean)
    whole = torch.as_tensor(wiring.real)
    kind, _, number = receiver.partition(".")[2].rstrip("]").partition("[")
    layer, into = int(receiver[1]), kind[-1] if kind.startswith("attn") else ""
    at = next(
        i for i, r in enumerate(wiring.receivers) if (r.layer, r.into) == (layer, into) and r.number == int(number or 0)
    )
    heads = [i for i in range(wiring.receivers[at].reads) if ".attn.z[" in wiring.senders[i]]
    cut = whole.repeat(len(heads), 1, 1)
    for row, sender in enumerate(heads):
        cut[row, sender, at] = False
    runs = CircuitRuns(of, pairs, wiring, read_fronts(of, pairs.clean, wiring))
    ours = (runs(cut) - runs.clean)[:, 0]
    theirs = torch.tensor([float(x) for x in grid.values.flatten()])
    torch.testing.assert_close(ours, theirs[: len(heads)], atol=2e-6, rtol=1e-4)
