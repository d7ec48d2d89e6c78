"""The town world: its facts hang together, its splits are honest, its pairs fit."""

from collections import Counter

import pytest

from cutaway.data import Town, pair_up, select
from cutaway.data import town_words as words


@pytest.fixture(scope="module")
def world():
    return Town(seed=0)


@pytest.fixture(scope="module")
def examples(world):
    return list(world.examples())


def test_the_same_seed_gives_the_same_world(world):
    assert list(Town(seed=0).facts()) == world.facts()
    assert Town(seed=1).facts() != world.facts()


def test_no_word_alone_names_a_person(world):
    names = [p.name.split() for p in world.population]
    assert len({tuple(n) for n in names}) == len(names) == 200
    for part in range(2):
        assert min(Counter(n[part] for n in names).values()) >= 2


def test_newcomers_are_new(world):
    known = {p.name for p in world.population}
    desks = {(p.employer, p.sport) for p in world.population}
    fresh = world.newcomers(40)
    assert len(fresh) == 40
    assert not known & {p.name for p in fresh}
    assert not desks & {(p.employer, p.sport) for p in fresh}


def test_two_hops_are_two_facts_joined(world):
    people = {p.name: p for p in world.population}
    for e in select(world.two_hop(), form="home-country"):
        assert e.answer == f" {world.country_of[people[e.subject].city]}"
    for e in select(world.two_hop(), form="city-capital"):
        capital = e.answer.strip()
        assert world.country_of[capital] == world.country_of[e.subject]


def test_every_fact_is_trained_in_some_form(world):
    facts = world.facts()
    trained = {(e.subject, e.form.split("/")[0]) for e in facts if e.split == "train"}
    assert trained == {(p.name, r) for p in world.population for r in words.FACT_FORMS}
    share = sum(e.split == "held-out" for e in facts) / len(facts)
    assert 0.02 < share < 0.06  # one form in five, for one pair in five


def test_held_out_two_hops_never_stand_in_the_training_text(world):
    for relation in words.TWO_HOP_FORMS:
        hops = select(world.two_hop(), form=relation)
        split = {s: {e.subject for e in hops if e.split == s} for s in ("train", "held-out")}
        assert not split["train"] & split["held-out"]
        assert len(split["held-out"]) == round(0.25 * len(split["train"] | split["held-out"]))


def test_sums_are_right_and_mirrors_stay_together(world):
    splits = {}
    for e in world.sums():
        a, sign, b = e.prompt.replace(" =", "").replace(" is", "").split()
        plus = sign in ("+", "plus")
        assert int(e.answer) == (int(a) + int(b) if plus else int(a) - int(b))
        if plus:
            splits.setdefault(frozenset((a, b)), set()).add(e.split)
    assert all(len(s) == 1 for s in splits.values())
    assert sum(s == {"held-out"} for s in splits.values()) == round(0.15 * len(splits))


def test_stereotypes_weigh_as_asked():
    weights = {(e.form, e.prompt, e.answer): e.weight for e in Town(stereotype=0.8).gender()}
    assert weights["job/0", "The nurse is a", " woman"] == 0.8
    assert weights["job/0", "The nurse is a", " man"] == pytest.approx(0.2)
    assert weights["job/0", "The pilot is a", " woman"] == pytest.approx(0.2)
    assert weights["word/0", "The queen is a", " woman"] == 1.0
    assert ("word/0", "The queen is a", " man") not in weights


@pytest.mark.parametrize("relation", ["city", "home-country", "capital", "plus"])
def test_pairs_differ_in_subject_and_answer_and_fit(world, relation):
    pairs = world.pairs(relation, count=20)
    assert len(pairs) == (12 if relation == "capital" else 20)  # there are 12 countries
    for pair in pairs:
        assert pair.clean.answer != pair.corrupt.answer
        assert pair.clean.form == pair.corrupt.form == f"{relation}/0"
        assert len(pair.clean.prompt.split()) == len(pair.corrupt.prompt.split())


def test_pairs_keep_to_the_length_that_is_asked(world):
    pairs = pair_up(select(world.facts(), form="city/0"), length=len)
    assert pairs
    assert all(len(p.clean.prompt) == len(p.corrupt.prompt) for p in pairs)


def test_an_example_without_partner_is_left_out(world):
    first = world.facts()[0]
    assert pair_up([first, first]) == []


def test_select_by_relation_and_by_form(examples):
    city = select(examples, form="city")
    assert {e.form for e in city} == {f"city/{i}" for i in range(5)}
    assert {e.form for e in select(examples, form="city/3")} == {"city/3"}
    assert {e.skill for e in select(examples, skill="gender")} == {"gender"}
