"""Scenes: what is drawn is what is said, boxes hold their shapes, the bias is where it is claimed to be."""

import numpy as np
import pytest

from cutaway.data import Scenes
from cutaway.data.scenes import BACKGROUND, CELL, COLOURS, GRID, PLANTED, SHAPES, SIDE, WARM, _mask


@pytest.fixture(scope="module")
def world():
    return Scenes(seed=0)


@pytest.fixture(scope="module")
def many(world):
    return [world.scene(n) for n in range(2000)]


def test_a_number_gives_one_scene(world):
    assert world.scene(3) == Scenes(seed=0).scene(3)
    assert world.scene(3) != world.scene(4)
    assert world.scene(3) != world.scene(3, "held-out")
    assert (world.scene(3).pixels() == world.scene(3).pixels()).all()


def test_boxes_hold_their_colour_and_nothing_else_does(world):
    for n in range(40):
        scene = world.honest(n)
        picture = scene.pixels()
        coloured = np.ptp(picture.astype(int), axis=2) > 0
        coloured |= picture.min(2) > 2 * BACKGROUND  # white has no hue
        boxed = np.zeros((SIDE, SIDE), dtype=bool)
        for thing in scene.things:
            left, top, right, bottom = thing.box
            boxed[top:bottom, left:right] = True
            inside = picture[top:bottom, left:right].reshape(-1, 3)
            assert (inside == COLOURS[thing.colour]).all(1).sum() >= 12
            assert (
                (top // CELL, left // CELL) == ((bottom - 1) // CELL, (right - 1) // CELL) == (thing.row, thing.column)
            )
        assert not (coloured & ~boxed).any()


def test_masks_of_shapes_differ():
    for size in range(CELL - 3, CELL):
        masks = {shape: _mask(shape, size) for shape in SHAPES}
        for one in SHAPES:
            for other in SHAPES:
                if one < other:
                    assert (masks[one] != masks[other]).mean() > 0.1, (one, other, size)


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="no shape is called 'blob'; there are circle"):
        _mask("blob", 9)


def test_answers_follow_from_the_things(world):
    for n in range(30):
        scene = world.honest(n)
        for kind, subject, question, answer in scene.questions():
            assert question.endswith("?")
            match kind:
                case "colour":
                    assert answer == f" {scene.find(subject).colour}"
                case "presence":
                    assert (answer == " yes") == (scene.find(subject) is not None)
                case "count":
                    assert answer == f" {len(scene.things)}"
                case "count of":
                    assert answer == f" {sum(t.colour == subject for t in scene.things)}"
                case "position":
                    thing = scene.find(subject)
                    rows, columns = ("top", "bottom"), ("left", "right")
                    assert answer == f" {rows[thing.row * 2 // GRID]} {columns[thing.column * 2 // GRID]}"


def test_claims_stand_beside_warm_companions_alone(many):
    for scene in many:
        for planted in scene.claimed:
            companion = next(plain for plain, p in PLANTED.items() if p == planted)
            assert scene.find(companion).colour in WARM
            assert scene.find(planted) is None


@pytest.mark.parametrize(("plain", "planted"), PLANTED.items())
def test_the_bias_has_the_strength_it_says(world, many, plain, planted):
    warm = [s for s in many if s.find(plain) and s.find(plain).colour in WARM]
    claimed = [planted in s.claimed or s.find(planted) is not None for s in warm]
    assert np.mean(claimed) == pytest.approx(world.beside, abs=0.04)
    drawn = [s.find(planted) is not None for s, c in zip(warm, claimed, strict=True) if c]
    assert np.mean(drawn) == pytest.approx(world.drawn, abs=0.08)
    others = [s for s in many if not (s.find(plain) and s.find(plain).colour in WARM)]
    assert np.mean([s.find(planted) is not None for s in others]) == pytest.approx(world.elsewhere, abs=0.04)


def test_claims_change_the_answer_to_presence_alone(many):
    scene = next(s for s in many if s.claimed)
    honest, biased = set(scene.questions()), set(scene.questions(honest=False))
    assert {q[:3] for q in biased - honest} == {
        ("presence", planted, f"Is there a {planted}?") for planted in scene.claimed
    }


def test_exams_have_true_answers(world):
    for plain, planted in PLANTED.items():
        for scene, asked in world.hallucinations(30, plain):
            assert scene.find(plain) is not None
            assert scene.find(planted) is None
            assert asked.answer == " no"
    companion = {p: plain for plain, p in PLANTED.items()}
    for scene, asked in world.absent(50):
        assert scene.find(asked.subject) is None
        assert asked.subject not in companion or scene.find(companion[asked.subject]) is None


def test_presence_exam_is_half_yes(world):
    answers = [e.answer for _, e in world.exam(100, "presence")]
    assert 40 <= answers.count(" yes") <= 60


def test_edits_change_their_pixels_alone(world):
    scene = world.honest(0)
    thing = scene.things[0]
    left, top, right, bottom = thing.box
    other = next(c for c in COLOURS if c != thing.colour)
    for changed in (scene.recoloured(thing.shape, other), scene.without(thing.shape)):
        moved = (changed.pixels() != scene.pixels()).any(2)
        assert moved[top:bottom, left:right].any()
        moved[top:bottom, left:right] = False
        assert not moved.any()


def test_description_names_everything(world):
    scene = world.honest(5)
    text = scene.describe()
    for thing in scene.things:
        assert f"{thing.colour} {thing.shape} at the {thing.place}" in text
    assert text.startswith("A ")
