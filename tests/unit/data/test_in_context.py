"""Recall and labels: answers can be read off the prompts, splits are kept, pairs fit."""

import pytest

from cutaway.data import Labels, recall, recall_pairs
from cutaway.data.labels import CATEGORIES


def value_of(prompt):
    *shown, asked = prompt.split()
    return shown[shown.index(asked) + 1]


def test_recall_answers_stand_in_the_prompt():
    for example in recall(50, pairs=4):
        assert example.answer == f" {value_of(example.prompt)}"
        assert len(example.prompt.split()) == 9


def test_recall_splits_differ_and_seeds_repeat():
    assert recall(5) == recall(5)
    assert recall(5, split="train") != recall(5, split="held-out")


def test_recall_pairs_differ_in_the_last_word_alone():
    for pair in recall_pairs(20):
        clean, corrupt = pair.clean.prompt.split(), pair.corrupt.prompt.split()
        assert clean[:-1] == corrupt[:-1]
        assert pair.clean.answer != pair.corrupt.answer
        assert pair.corrupt.answer == f" {value_of(pair.corrupt.prompt)}"


@pytest.fixture(scope="module")
def world():
    return Labels(seed=0)


def category(word):
    return next(c for c, members in CATEGORIES.items() if word in members.split())


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_a_label_follows_its_category(world, split):
    for example in world.examples(50, shots=6, words=split, labels=split):
        *shown, asked = example.prompt.split(" ; ")
        label_of = {category(word): label for word, label in (s.split() for s in shown)}
        assert example.answer == f" {label_of[category(asked)]}"
        assert asked not in {s.split()[0] for s in shown}
        assert asked in world.words(category(asked), split)
        assert set(label_of.values()) <= set(world.labels(split))


def test_splits_of_words_and_labels_part_them(world):
    for c in CATEGORIES:
        assert not set(world.words(c, "train")) & set(world.words(c, "held-out"))
    assert len(world.labels("held-out")) == 10


def test_label_pairs_ask_for_the_other_label(world):
    for pair in world.pairs(20, shots=4):
        assert pair.clean.prompt.split()[:-1] == pair.corrupt.prompt.split()[:-1]
        assert pair.clean.answer != pair.corrupt.answer
