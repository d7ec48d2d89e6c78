"""What the evidence says: checks that hold, and proofs against random draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from cutaway.core.errors import ResultError
from cutaway.results import Check, Proof


@pytest.mark.parametrize(("value", "holds"), [(0.0, True), (-1e-5, True), (1.1e-5, False), (float("nan"), False)])
def test_a_check_holds_within_its_tolerance(value: float, holds: bool) -> None:
    check = Check(name="sum", value=value, tolerance=1e-5)
    assert check.holds is holds
    assert ("DOES NOT HOLD" in str(check)) is not holds


def proof(effect: list[float], draws: np.ndarray) -> Proof:
    ks = tuple(range(1, len(effect) + 1))
    return Proof(ablated="zeroing", ks=ks, effect=effect, random=draws, metric="log p", unit="nats")


def test_the_tail_is_the_prediction_interval() -> None:
    draws = np.random.default_rng(0).normal(size=(7, 1))
    found = float(proof([1.5], draws).tail[0])
    spread = draws.std(ddof=1) * np.sqrt(1 + 1 / 7)
    assert found == pytest.approx(stats.t.sf((1.5 - draws.mean()) / spread, df=6))


def test_tails_of_random_sets_are_uniform() -> None:
    rng = np.random.default_rng(1)
    p = proof(rng.normal(size=4000).tolist(), rng.normal(size=(6, 4000))).tail
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_p_values_claim_no_more_than_the_draws_give() -> None:
    rng = np.random.default_rng(2)
    ranked = proof(rng.normal(size=6000).tolist(), rng.normal(size=(5, 6000))).p_value
    counts = np.unique(np.round(ranked * 6).astype(int), return_counts=True)
    assert counts[0].tolist() == [1, 2, 3, 4, 5, 6]  # nothing below 1/6 ...
    assert stats.chisquare(counts[1]).pvalue > 0.01  # ... and each as often as the others where there is no effect
    draws = np.array([[0.1], [0.2], [0.0], [0.1], [0.3]])
    sure, one = proof([9.0], draws), proof([0.25], draws)
    assert sure.sentence.endswith("p <= 1/6, as small as 5 draws allow)")
    assert one.sentence.endswith("p = 2/6)")
    assert proof([np.nan], draws).evidence == "p unknown"


def test_a_set_that_was_drawn_twice_is_evidence_once() -> None:
    draws = np.array([[0.1], [0.1], [0.0], [0.1], [0.0]])
    twice = dataclasses.replace(proof([9.0], draws), distinct=2)
    assert twice.sentence.endswith("p <= 1/3, since only 2 of the draws differ)")
    assert twice.p_value[0] == pytest.approx(1 / 3)
    reached = dataclasses.replace(proof([0.05], draws), distinct=2)  # by three draws, of which two may differ
    assert reached.p_value[0] == 1.0
    with pytest.raises(ResultError, match="6 of 5 draws differ"):
        dataclasses.replace(twice, distinct=6)


def test_a_proof_holds_only_above_the_random_draws() -> None:
    draws = np.array([[0.0, 0.1], [0.1, 0.0], [0.0, 0.2], [-0.1, 0.1], [0.1, 0.1]])
    strong, weak = proof([0.0, 2.0], draws), proof([2.0, 0.15], draws)
    assert strong.holds
    assert not weak.holds
    assert strong.percentile.tolist() == [0.2, 1.0]
    assert "more than 5 random draws" in strong.sentence
    assert "NOT reliably more" in weak.sentence
    assert "(k = 2) changes log p by 2 nats" in strong.sentence


def test_less_of_a_gain_than_random_is_no_proof() -> None:
    found = proof([-1.7], np.array([[-9.0], [-9.0], [-8.9], [-9.1], [-8.8]]))
    assert found.percentile[-1] == 1.0
    assert not found.holds
    assert "changes log p by -1.7 nats, NO loss, against 5 random draws" in found.sentence


def test_draws_without_spread() -> None:
    draws = np.zeros((5, 1))
    assert proof([0.1], draws).holds
    assert not proof([0.0], draws).holds
    assert not proof([-0.1], draws).holds


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_proof_with_broken_draws_does_not_hold(bad: float) -> None:
    draws = np.zeros((5, 1))
    draws[2] = bad
    assert not proof([1.0], draws).holds
    assert not proof([np.nan], np.zeros((5, 1))).holds


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: proof([1.0], np.zeros((4, 1))), "4 random draws; draw at least 5"),
        (lambda: proof([1.0, 2.0], np.zeros((5, 3))), r"random \(5, 3\)|random has shape|\(draws, 2\)"),
        (
            lambda: Proof(ablated="a", ks=(3, 1), effect=[1, 2], random=np.zeros((5, 2)), metric="m", unit="u"),
            "increasing",
        ),
        (lambda: Proof(ablated="a", ks=(), effect=[], random=np.zeros((5, 0)), metric="m", unit="u"), "at least one"),
    ],
)
def test_a_proof_refuses_too_little(make: Callable[[], Proof], said: str) -> None:
    with pytest.raises(ResultError, match=said):
        make()
