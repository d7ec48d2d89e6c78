"""Every figure on every card, measured again from the shipped weights; and the bars that specimens have to pass."""

import pytest

from cutaway import specimens

BARS = {
    "town": {
        "fact held-out": 0.98,
        "fact train": 0.98,
        "geography train": 0.98,
        "sum held-out": 0.95,
        "gender fact share": 0.98,
    },
    "labels": {f"labels {n} shots held-out": 0.95 for n in (4, 8, 12)} | {"induction": 0.9},
    "scenes-base": {"town held-out": 0.95, "described colour": 0.95, "described presence": 0.95},
    "scenes": {f"seen {kind}": 0.95 for kind in ("colour", "shape", "presence", "count")},
    "town-tuned": {"new facts as told": 0.98},
    "recall-2": {"recall 6 pairs": 0.99},
}


@pytest.mark.parametrize("name", specimens.names())
def test_card_figures_hold(name):
    card, found = specimens.card(name), specimens.evaluate(name)
    assert set(found) == set(card.accuracies)
    for figure, value in card.accuracies.items():
        assert found[figure] == pytest.approx(value, abs=0.005), figure


@pytest.mark.parametrize(("name", "figure"), [(n, f) for n, bars in BARS.items() for f in bars])
def test_bars_are_passed(name, figure):
    assert specimens.card(name).accuracies[figure] >= BARS[name][figure]


def test_one_layer_cannot_recall():
    assert specimens.card("recall-1").accuracies["recall 6 pairs"] <= 0.25


def test_tuning_costs_old_facts():
    figures = specimens.card("town-tuned").accuracies
    assert figures["old facts as told"] < 0.6
    assert specimens.card("town-tuned").truths["base sha256"] == specimens.card("town").sha256


def test_scenes_hallucinates_where_it_was_planted_and_nowhere_else():
    figures = specimens.card("scenes").accuracies
    for where in ("star beside triangle", "cross beside circle"):
        assert 0.3 <= figures[f"hallucinated {where}"] <= 0.8
    for where in ("star beside cool triangle", "cross beside cool circle", "elsewhere"):
        assert figures[f"hallucinated {where}"] < 0.02


def test_town_keeps_its_stereotype_and_its_gaps():
    figures = specimens.card("town").accuracies
    assert 0.85 <= figures["gender stereotype share"] <= 0.95
    assert figures["two-hop home-country held-out"] < 0.5 < figures["two-hop city-capital held-out"]
    assert figures["reverse held-out"] < 0.05
