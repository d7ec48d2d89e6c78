"""Walks of a sweep within a budget."""

from cutaway.core.intervention import Zero
from cutaway.engine.plan import Sizes, plan_walks
from cutaway.engine.reduce import Entry

SIZES = Sizes(row=100, held=10, key=10, heads=2, end=16)


def entries(n: int) -> list[Entry]:
    items = [(layer, p) for layer in range(n) for p in range(16)]
    return [
        Entry(i, Zero(f"L{layer}.resid_pre@{p}"), Zero(f"L{layer}.resid_pre@{p}").site, layer, False, (p,), p)
        for i, (layer, p) in enumerate(items)
    ]


def test_every_run_walks_once_and_within_the_budget() -> None:
    budget = 40_000
    walks, peak = plan_walks(entries(4), SIZES, budget)
    assert sorted(e.run for walk in walks for e in walk) == list(range(64))
    assert len(walks) > 1
    assert budget / 2 < peak <= budget


def test_runs_of_one_start_walk_together() -> None:
    walks, _ = plan_walks(entries(4), SIZES, 10**9)
    assert len(walks) == 1
    starts = [e.first for e in walks[0]]
    assert starts == sorted(starts)


def test_one_run_walks_alone_when_not_even_it_fits() -> None:
    walks, peak = plan_walks(entries(1), SIZES, 1)
    assert [len(w) for w in walks] == [1] * 16
    assert peak == 16 * (SIZES.row + SIZES.held) + SIZES.attention(0) > 1


def test_a_walk_holds_more_rows_than_go_through_a_layer_together() -> None:
    """Beyond that, a row takes what it needs between layers."""
    many, few = (plan_walks(entries(n), SIZES, 10**12) for n in (1200, 600))
    assert len(many[0]) == len(few[0]) == 1
    assert many[1] - few[1] == 600 * sum(range(1, 17)) * SIZES.held


def test_a_shared_prefix_takes_less_than_its_copies() -> None:
    long = Sizes(row=100, held=10, key=10_000, heads=2, end=600)
    assert long.attention(592) < 600 * long.key


def test_nothing_to_run() -> None:
    assert plan_walks([], SIZES, 100) == ([], 0)
