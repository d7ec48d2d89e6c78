"""What a proof names, and the random sets that it is compared with."""

from __future__ import annotations

import torch

from cutaway.ops.draws import different, prove_sets, worthwhile
from cutaway.ops.units import Unit


def test_components_with_a_thousandth_of_the_best_score_are_worth_a_proof() -> None:
    units = [Unit("mlp.act", 0, i) for i in range(4)]
    assert worthwhile(units, [2.0, 0.003, 0.001, -1.0]) == units[:2]
    assert worthwhile(units, [-1.0] * 4) == []


def test_cells_with_a_hundredth_of_the_best_score_are_worth_a_proof() -> None:
    seen: list[list[list[int]]] = []

    def effect(sets: list[list[int]]) -> torch.Tensor:
        seen.append(sets)
        return torch.tensor([float(len(some)) for some in sets])

    scores = torch.tensor([2.0, 0.03, 0.01, float("nan"), *[0.0] * 8])
    proof = prove_sets(effect, scores, [0] * 12, 5, 0, ablated="nothing", metric="size", unit="cells")
    assert proof is not None
    named, random = seen[0][1], seen[0][3::2]  # sets of one and of two cells take turns
    assert (proof.ks, named) == ((1, 2), [0, 1])
    assert proof.distinct == different(random)
    assert not {0, 1, 3} & {cell for some in random for cell in some}


def test_sets_differ_by_what_is_in_them() -> None:
    assert different([[1, 2], [2, 1], [1, 3]]) == 2
