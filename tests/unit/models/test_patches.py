"""Patch grids: what a bright square changes in the real processor and model is where the grids say it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from cutaway.core.inputs import Inputs
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.models.patches import patch_grids
from tests.unit.models.vlm_folders import FAMILIES, PATCH, SIDE, save

Square = tuple[int, int, int, int]  # left, top, right, bottom
PROMPT = "what is here"
SHAPES = [(64, 64), (50, 40), (120, 50), (40, 90), (33, 31), (16, 24)]
BRIGHT = 0.3  # of the largest change: what resampling spreads over neighbours is less
BLUR = 2.0  # pixels of the image that resampling spreads a square by, per pixel that the model gets, at most


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Model]:
    folder = tmp_path_factory.mktemp(request.param)
    save(request.param, folder)
    return request.param, patchwise(load(folder))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    save("llava", folder)
    return folder


def patchwise(model: Model) -> Model:
    """The model with a vision tower in which no patch hears of another: attention adds nothing."""
    with torch.no_grad():
        for name, module in model.hf.named_modules():
            if "vis" in name and "Attention" in type(module).__name__:
                for weight in module.parameters():
                    weight.zero_()
    return model


def embedded(model: Model, inputs: Inputs) -> Tensor:
    """[pos, d_model] what the language model gets: token embeddings, and image features in their places."""
    inner: Any = model.hf.model
    language = inner.language_model if hasattr(inner, "language_model") else inner.text_model
    seen: list[Tensor] = []
    handle = language.register_forward_pre_hook(lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True)
    try:
        model(inputs)
    finally:
        handle.remove()
    return seen[0][0]


def painted(size: tuple[int, int], square: Square) -> Image.Image:
    image = Image.new("RGB", size)
    left, top, right, bottom = square
    ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill="white")
    return image


def squares(size: tuple[int, int]) -> Iterator[Square]:
    """Squares of a tenth of the image, at a few places that no grid is aligned with."""
    width, height = size
    w, h = max(2, width // 10), max(2, height // 10)
    for x in (0.07, 0.31, 0.58, 0.87):
        for y in (0.12, 0.41, 0.69, 0.9):
            yield int(x * width), int(y * height), int(x * width) + w, int(y * height) + h


def overlaps(box: Tensor, square: Square, margin: float) -> bool:
    left, top, right, bottom = (box + torch.tensor([-margin, -margin, margin, margin])).tolist()
    return left < square[2] and square[0] < right and top < square[3] and square[1] < bottom


def inside(box: Tensor, square: Square, margin: float) -> bool:
    left, top, right, bottom = (box - torch.tensor([-margin, -margin, margin, margin])).tolist()
    return left <= square[0] and square[2] <= right and top <= square[1] and square[3] <= bottom


def check(model: Model, size: tuple[int, int], blur: float) -> int:
    """Compares every grid with what squares change; returns how often a square in one patch was found there."""
    black = model.inputs(PROMPT, image=Image.new("RGB", size))
    base, exact = embedded(model, black), 0
    for square in squares(size):
        inputs = model.inputs(PROMPT, image=painted(size, square))
        assert [g.positions for g in inputs.grids] == [g.positions for g in black.grids]
        change = (embedded(model, inputs) - base).norm(dim=-1)
        known = {p for grid in inputs.grids for p in grid.positions}
        assert not any(change[p] for p in range(len(change)) if p not in known), (
            "a position outside of the grids changed"
        )
        for grid in inputs.grids:
            here = change[list(grid.positions)]
            for patch in (here > BRIGHT * change.max()).nonzero().flatten().tolist():
                assert overlaps(grid.boxes[patch], square, blur), (size, square, grid.boxes[patch], grid.shape)
            holds = [i for i, box in enumerate(grid.boxes) if inside(box, square, blur)]
            if holds:
                assert int(here.argmax()) == holds[0], (size, square, grid.shape, holds, here)
                exact += 1
    return exact


@pytest.mark.parametrize("size", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_a_square_changes_the_patches_whose_boxes_it_lies_in(family: tuple[str, Model], size: tuple[int, int]) -> None:
    _, model = family
    grids = model.inputs(PROMPT, image=Image.new("RGB", size)).grids
    assert grids
    blur = BLUR * max(1.0, max(size) / SIDE / 2)
    exact = check(model, size, blur)
    if size == (64, 64):
        assert exact > 0, "no square lay wholly in a patch: the test would not see a wrong order"


def test_every_image_position_is_in_one_grid_or_ends_a_row(family: tuple[str, Model]) -> None:
    name, model = family
    inputs = model.inputs(PROMPT, image=Image.new("RGB", (70, 40)))
    image = [p for p, role in enumerate(inputs.roles[0]) if role == "image"]
    found = [p for grid in inputs.grids for p in grid.positions]
    assert len(found) == len(set(found))
    assert set(found) <= set(image)
    newlines = sum(grid.shape[0] for grid in inputs.grids[1:]) if name.startswith("llava_") else 0
    assert len(image) - len(found) == newlines
    for grid in inputs.grids:
        assert grid.boxes.shape == (grid.shape[0] * grid.shape[1], 4)
        assert len(grid.positions) == len(grid.boxes)
        assert (grid.boxes >= 0).all()
        assert (grid.boxes[:, 2] <= 70).all()
        assert (grid.boxes[:, 3] <= 40).all()


def test_the_boxes_cover_what_the_model_sees_of_the_image(family: tuple[str, Model]) -> None:
    """Everything, but for LLaVA, whose processor crops the middle."""
    name, model = family
    grids = model.inputs(PROMPT, image=Image.new("RGB", (80, 48))).grids
    boxes = (torch.cat([g.boxes for g in grids]) if name in {"idefics3", "smolvlm", "internvl"} else grids[0].boxes).T
    times = 2 if len(grids) > 1 and not name.startswith("llava") else 1  # the tiles, and then the whole
    seen = 48 * 48 if name in {"llava", "vipllava"} else 80 * 48 * times
    assert float(((boxes[2] - boxes[0]) * (boxes[3] - boxes[1])).sum()) == pytest.approx(seen, rel=0.01)


# -- variants ----------------------------------------------------------------------------------------------------------
def variant(folder: Path, **settings: Any) -> Model:
    """The model of a folder, its image processor set otherwise."""
    model = patchwise(load(folder))
    for name, value in settings.items():
        setattr(model.processor.image_processor, name, value)
    return model


def test_a_margin_that_is_cropped_away_has_no_patch(llava: Path) -> None:
    grids = variant(llava).inputs(PROMPT, image=Image.new("RGB", (120, 50))).grids
    assert (float(grids[0].boxes[:, 0].min()), float(grids[0].boxes[:, 2].max())) == pytest.approx((35, 85), abs=1.6)


@pytest.mark.parametrize("size", [(96, 40), (40, 96)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_an_image_padded_to_a_square_has_empty_boxes_in_the_padding(llava: Path, size: tuple[int, int]) -> None:
    model = variant(llava, do_pad=True)
    assert check(model, size, blur=4) > 0
    (grid,) = model.inputs(PROMPT, image=Image.new("RGB", size)).grids
    short = int(size[0] > size[1])  # the axis along which the image was padded
    lengths = (grid.boxes[:, 2 + short] - grid.boxes[:, short]).reshape(4, 4)
    across = lengths if short else lengths.T
    assert (across[0] == 0).all()
    assert (across[3] == 0).all()
    assert across.sum(dim=0).tolist() == pytest.approx([40] * 4)


def test_a_class_token_in_front_is_no_patch(llava: Path) -> None:
    model = variant(llava)
    model.hf.config.vision_feature_select_strategy = model.processor.vision_feature_select_strategy = "full"
    inputs = model.inputs(PROMPT, image=Image.new("RGB", (64, 64)))
    image = [p for p, role in enumerate(inputs.roles[0]) if role == "image"]
    assert inputs.grids[0].positions == tuple(image[1:])
    assert check(model, (64, 64), blur=2) > 0


def test_several_images_have_a_grid_each_in_their_order(llava: Path) -> None:
    model = variant(llava)
    images = [Image.new("RGB", (64, 64)), Image.new("RGB", (32, 32))]
    first, second = model.inputs("<image> what <image> is", image=images).grids
    assert first.positions[-1] < second.positions[0] - 1
    assert (float(first.boxes.max()), float(second.boxes.max())) == (64, 32)


def test_an_image_that_is_not_split_is_one_tile(tmp_path: Path) -> None:
    save("smolvlm", tmp_path)
    model = variant(tmp_path, do_image_splitting=False)
    assert [g.shape for g in model.inputs(PROMPT, image=Image.new("RGB", (64, 40))).grids] == [(2, 2)]
    assert check(model, (64, 40), blur=4) > 0


def test_too_many_patches_are_shrunk_as_the_model_shrinks_them(tmp_path: Path) -> None:
    save("llava_onevision", tmp_path)
    model = variant(tmp_path)
    model.hf.config.vision_aspect_ratio = model.processor.vision_aspect_ratio = "anyres_max_1"
    grids = model.inputs(PROMPT, image=Image.new("RGB", (64, 64))).grids
    assert [g.shape for g in grids] == [(4, 4), (4, 4)]
    assert check(model, (64, 64), blur=2) > 0


# -- what is not understood --------------------------------------------------------------------------------------------
def test_an_unknown_family_has_spans_and_no_grid(llava: Path) -> None:
    model = variant(llava)
    inputs = model.inputs(PROMPT, image=Image.new("RGB", (32, 32)))
    assert inputs.grids
    unknown = type("Config", (), {"model_type": "something_else"})()
    assert patch_grids(inputs, unknown, model.processor) == ()
    assert inputs.roles[0].count("image") == (SIDE // PATCH) ** 2


def test_positions_that_do_not_add_up_have_no_grid(llava: Path) -> None:
    model = variant(llava)
    inputs = model.inputs(PROMPT, image=Image.new("RGB", (32, 32)))
    twice = replace(inputs, images=inputs.images * 3)
    assert patch_grids(twice, model.hf.config, model.processor) == ()
    model.processor.image_processor.size = {"longest_edge": 32}
    assert patch_grids(inputs, model.hf.config, model.processor) == ()


def test_text_alone_has_no_grid(llava: Path) -> None:
    assert variant(llava).inputs("what is here").grids == ()
