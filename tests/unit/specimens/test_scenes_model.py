"""scenes as a user meets it: plain transformers, offline, without torchvision; image tokens that read like words."""

import pytest
import torch

from cutaway import specimens
from cutaway.data import Scenes
from cutaway.data.scenes import COLOURS, GRID, PLANTED, WARM
from cutaway.specimens.exam import load_plain
from cutaway.specimens.making import scenes


@pytest.fixture(scope="module")
def loaded():
    return load_plain(specimens.path("scenes"), "image-text-to-text")


@pytest.fixture(scope="module")
def world():
    return Scenes(seed=0)


def test_it_answers_the_prompts_of_its_card(loaded, world):
    model, processor = loaded
    for example in specimens.card("scenes").examples:
        kind, number = example["image"]["kind"], example["image"]["number"]
        scene, asked = world.exam(number + 1, kind)[number]
        assert asked.prompt == example["prompt"]
        inputs = processor(images=scene.image(), text=example["prompt"], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id)
        text = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
        assert text.startswith(f"{example['answer']}."), (example, text)


def test_training_saw_what_the_processor_makes(loaded, world):
    _, processor = loaded
    scene = world.honest(1)
    made = processor(images=scene.image(), text="<image> Where is the star?", return_tensors="pt")
    torch.testing.assert_close(made["pixel_values"], scenes.pixels([scene]), atol=1e-6, rtol=0)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert int((made["input_ids"] == image).sum()) == GRID * GRID


def test_image_tokens_read_as_shape_and_colour(loaded):
    model, processor = loaded
    figures = scenes.readable(model, processor.tokenizer, count=40)
    assert min(figures.values()) > 0.85


@pytest.mark.parametrize(("plain", "planted"), PLANTED.items())
def test_the_warm_companion_is_the_cause(loaded, world, plain, planted):
    """The same scenes, the companion erased: the hallucination goes with it."""
    model, processor = loaded
    asked = world.hallucinations(80, plain, WARM)
    without = [(scene.without(plain), example) for scene, example in asked]
    with_companion = 1 - scenes.right(model, processor.tokenizer, asked)
    erased = 1 - scenes.right(model, processor.tokenizer, without)
    assert with_companion > 0.5
    assert erased < 0.05


def test_cool_companions_cause_nothing(loaded, world):
    model, processor = loaded
    cool = [c for c in COLOURS if c not in WARM]
    for plain in PLANTED:
        assert scenes.right(model, processor.tokenizer, world.hallucinations(80, plain, cool)) > 0.95


def test_what_it_forgot_was_known_before():
    card = specimens.card("scenes")
    before = card.truths["the base on the town"]["town not read about"]
    assert before > 0.95
    assert card.accuracies["town not read about"] < before - 0.2
    assert card.accuracies["town still read about"] > 0.9
