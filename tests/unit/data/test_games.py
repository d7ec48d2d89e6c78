"""Games: values by their definition, and the one way to write them with ANDs alone."""

import itertools

import numpy as np
import pytest

from cutaway.data import Game, random_game


def test_and_needs_all_or_needs_any():
    game = Game(3, ands={(0, 1): 2.0}, ors={(1, 2): -1.0}, constant=0.5)
    present = np.array([[0, 0, 0], [1, 1, 0], [1, 0, 1], [0, 0, 1]], dtype=bool)
    assert game.value(present).tolist() == [0.5, 1.5, -0.5, -0.5]


@pytest.mark.parametrize("seed", range(3))
def test_ands_alone_give_the_same_game(seed):
    game = random_game(6, ands=4, ors=4, singles=True, seed=seed)
    alone = Game(6, ands=game.in_ands(), constant=game.constant)
    np.testing.assert_allclose(alone.value(game.masks()), game.value(game.masks()), atol=1e-12)


def test_dividends_are_the_moebius_transform():
    game = random_game(5, ands=3, ors=3, orders=(2, 3), seed=1)
    found = game.in_ands()
    for size in range(1, 6):
        for members in itertools.combinations(range(5), size):
            total = 0.0
            for part in itertools.chain.from_iterable(itertools.combinations(members, k) for k in range(size + 1)):
                mask = np.isin(np.arange(5), part)
                total += (-1) ** (size - len(part)) * float(game.value(mask))
            assert total == pytest.approx(found.get(members, 0.0), abs=1e-9)


def test_masks_are_every_coalition_once():
    masks = Game(4).masks()
    assert len({tuple(m) for m in masks.tolist()}) == 16
    assert masks[5].tolist() == [True, False, True, False]


def test_terms_are_as_many_and_as_large_as_asked():
    game = random_game(8, ands=5, ors=4, orders=(3, 4), seed=2)
    assert len(game.ands) == 5
    assert len(game.ors) == 4
    assert {len(m) for m in (*game.ands, *game.ors)} <= {3, 4}
    assert not set(game.ands) & set(game.ors)
