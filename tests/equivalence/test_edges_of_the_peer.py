"""Edge scores are those of the published EAP-IG code, up to the differences that the page of ``edges`` tells.

tools/make_edge_oracle.py made the arrays where that code is installed; see tests/golden/eap_ig/README.md.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.repro.eap_ig import both, compared, theirs
from cutaway.models.handle import Model
from cutaway.ops.edge_scores import edge_scores, path_points
from cutaway.ops.fronts import read_fronts
from cutaway.ops.pairs import Pairs
from cutaway.ops.stats import rank_correlation
from cutaway.ops.wiring import Wiring
from tools.make_edge_oracle import STEPS, recipes, task
from tools.make_oracle import build

# Where the published code takes gradients: EAP at the clean run; EAP-IG from the corrupt run on, k = 0 ... m - 1.
POINTS = {"eap": [1.0], **{f"eap_ig_{m}": [k / m for k in range(m)] for m in STEPS}}


def ours(name: str, points: list[float]) -> tuple[Tensor, Wiring]:
    """[sender, receiver] our scores of the same pairs."""
    recipe = recipes()[name]
    model = Model(build(recipe)[0])
    clean, corrupt, answers, rivals = task(recipe)
    pairs = Pairs.of(model.inputs(clean), model.inputs(corrupt), None, answers, rivals)
    wiring = Wiring.of_model(model)
    return edge_scores(model, pairs, wiring, read_fronts(model, pairs.clean, wiring), points).scores, wiring


@pytest.mark.parametrize("scores", list(POINTS))
@pytest.mark.parametrize("name", list(recipes()))
def test_scores_are_theirs_at_their_points(name: str, scores: str) -> None:
    found, wiring = ours(name, POINTS[scores])
    expected = theirs(name, scores, wiring)
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    real = torch.as_tensor(wiring.real)
    assert rank_correlation(found[real], expected[real]) > 0.9999
    assert float(expected[~real].abs().max()) == 0.0


@pytest.mark.parametrize("name", list(recipes()))
def test_one_step_is_their_eap_and_more_steps_are_other_points_of_the_same_line(name: str) -> None:
    found, wiring = ours(name, path_points(1))
    assert float((found - theirs(name, "eap", wiring)).abs().max()) < 1e-5
    found, _ = ours(name, path_points(STEPS[-1]))
    real, expected = wiring.real, theirs(name, f"eap_ig_{STEPS[-1]}", wiring)
    assert 0.9 < np.corrcoef(found[real], expected[real])[0, 1] < 0.9999


@pytest.mark.parametrize("name", list(recipes()))
def test_edges_with_one_step_are_their_eap_edge_by_edge(name: str) -> None:
    found, expected = both(name, "eap", 1)
    assert compared(found, expected)["spearman"] >= 0.999
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", list(recipes()))
@pytest.mark.parametrize("steps", STEPS)
def test_with_clean_and_corrupt_exchanged_edges_are_their_eap_ig_edge_by_edge(name: str, steps: int) -> None:
    found, expected = both(name, f"eap_ig_{steps}", steps, exchanged=True)
    assert compared(found, expected)["spearman"] >= 0.999
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    plain, _ = both(name, f"eap_ig_{steps}", steps)
    assert compared(plain, expected)["spearman"] < 0.999
