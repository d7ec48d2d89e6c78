"""Processors: each family's folder opens without torchvision, and gives the ids and pixels that its parts give."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.utils import is_torchvision_available

from cutaway.core.errors import ImageError, LoadError, UnsupportedError
from cutaway.models.load import load
from cutaway.models.processor import NoVideo, has_images, load_processor
from cutaway.models.tiny import tiny
from tests.unit.models.vlm_folders import FAMILIES, SIDE, save

IMAGE = Image.linear_gradient("L").resize((50, 40)).convert("RGB")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
# transformers makes the tokenizer of Qwen 3.5 anew as byte-level BPE, which one of whole words does not survive.
WORDS = sorted(name for name in FAMILIES if not name.startswith("qwen3_5"))
VIDEO = [name for name in WORDS if FAMILIES[name].model.startswith(("SmolVLM", "Qwen", "InternVL"))]


@pytest.fixture(scope="module", params=WORDS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    save(request.param, folder)
    return request.param, folder


def test_a_folder_of_every_family_opens_and_its_images_reach_the_answer(family: tuple[str, Path]) -> None:
    name, folder = family
    model = load(folder)
    assert type(model.hf).__name__ == FAMILIES[name].model
    assert type(model.processor).__name__ == FAMILIES[name].processor
    inputs = model.inputs("question one", image=IMAGE)
    trace = model.trace(inputs, want="L0.resid_post")
    assert trace["L0.resid_post"].shape == (1, inputs.ids.shape[1], 64)
    with torch.no_grad():
        plain = model.hf(**inputs.kwargs(model.device), use_cache=False).logits
    assert torch.equal(trace.logits, plain)
    other = model.inputs("question one", image=IMAGE.rotate(180))
    assert not torch.equal(model(other)[0, -1], plain[0, -1])


def test_image_positions_are_the_placeholders_and_nothing_else(family: tuple[str, Path]) -> None:
    """A token before or after the image, or at the end of a row of patches, is special."""
    name, folder = family
    model = load(folder)
    inputs = model.inputs("question one", image=IMAGE)
    placeholder = next(iter(FAMILIES[name].tokens.values()))
    assert {t for t, role in zip(inputs.tokens[0], inputs.roles[0], strict=True) if role == "image"} == {placeholder}
    assert model.encoder.image_ids == {model.hf.config.image_token_id}
    with torch.no_grad():
        features = model.hf.get_image_features(**{k: v for k, v in inputs.extra.items() if not k.endswith("type_ids")})
    rows = features.pooler_output
    count = sum(r.shape[:-1].numel() for r in (rows if isinstance(rows, list | tuple) else [rows]))
    assert inputs.roles[0].count("image") == count


def test_text_alone_needs_no_image(family: tuple[str, Path]) -> None:
    model = load(family[1])
    inputs = model.inputs(["question one", "what is the red square"])
    assert "image" not in inputs.roles[0] + inputs.roles[1]
    assert model(inputs).isfinite().all()


def test_pixels_come_from_the_pillow_image_processor(family: tuple[str, Path]) -> None:
    _, folder = family
    alone = AutoImageProcessor.from_pretrained(folder, backend="pil")
    processor = load(folder).processor
    assert type(processor.image_processor) is type(alone)
    settings = {"crop_to_patches": True} if hasattr(alone, "crop_to_patches") else {}
    pixels = torch.as_tensor(alone(images=[IMAGE], return_tensors="pt", **settings)["pixel_values"])
    made = load(folder).inputs("question", image=IMAGE).extra["pixel_values"]
    assert torch.equal(made, pixels)


def test_saved_again_the_processor_is_the_same(family: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = family
    model = load(folder)
    model.processor.save_pretrained(tmp_path)
    model.hf.save_pretrained(tmp_path)
    one, two = (json.loads((f / "processor_config.json").read_text()) for f in (folder, tmp_path))
    assert one == two
    first, again = (m.inputs("question", image=IMAGE) for m in (model, load(tmp_path)))
    assert first.digest == again.digest


@pytest.mark.parametrize(
    "name", [n for n in FAMILIES if n in {"llava", "paligemma", "gemma3", "llava_next", "idefics3"}]
)
def test_where_transformers_can_make_the_processor_ours_is_the_same(name: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    theirs, ours = AutoProcessor.from_pretrained(tmp_path), load(tmp_path).processor
    assert type(ours) is type(theirs)
    assert ours.to_dict() == theirs.to_dict()


@pytest.mark.parametrize("name", VIDEO)
def test_a_chat_template_works_and_a_video_is_refused(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    token = next(iter(family.tokens.values()))
    save(name, tmp_path, TEMPLATE.replace("IMAGE", token))
    model = load(tmp_path)
    inputs = model.inputs("question one", image=IMAGE)
    assert inputs.tokens[0][-2:] == ("question", "one")
    assert "image" in inputs.roles[0]
    if not is_torchvision_available():
        assert isinstance(model.processor.video_processor, NoVideo)
        with pytest.raises(UnsupportedError, match="torchvision is not installed"):
            model.processor.video_processor(videos=[IMAGE])


def test_settings_of_videos_are_found_where_earlier_versions_wrote_them(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"merge_size": 2}')
    assert NoVideo.from_pretrained(tmp_path).merge_size == 2
    (tmp_path / "video_preprocessor_config.json").write_text('{"merge_size": 3}')
    assert NoVideo.from_pretrained(tmp_path).merge_size == 3
    (tmp_path / "processor_config.json").write_text('{"video_processor": {"merge_size": 4}}')
    assert NoVideo.from_pretrained(tmp_path).merge_size == 4
    assert NoVideo.from_pretrained(tmp_path).fps is None


def test_the_pillow_twin_is_in_no_ones_place_afterwards(tmp_path: Path) -> None:
    save("mistral3", tmp_path)
    assert load(tmp_path).processor.image_processor.backend == "pil"
    assert "transformers.models.pixtral.image_processing_pixtral" not in sys.modules or is_torchvision_available()


# -- parts that are missing --------------------------------------------------------------------------------------------
def test_without_settings_of_images_the_tokenizer_is_left(tmp_path: Path) -> None:
    save("llava", tmp_path)
    (tmp_path / "processor_config.json").unlink()
    model = load(tmp_path)
    assert model.inputs("what is").ids.shape == (1, 2)
    with pytest.raises(ImageError, match="without an image processor"):
        model.inputs("what is", image=IMAGE)


def test_settings_of_images_in_a_file_of_their_own_are_read(tmp_path: Path) -> None:
    save("llava", tmp_path)
    before = load(tmp_path).inputs("what", image=IMAGE)
    nested = json.loads((tmp_path / "processor_config.json").read_text())
    images = nested.pop("image_processor")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert load(tmp_path).inputs("what", image=IMAGE).digest == before.digest


def test_without_tokenizer_files_there_is_no_processor(tmp_path: Path) -> None:
    save("llava", tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    assert load(tmp_path).processor is None


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    save("llava", tmp_path)
    config = load(tmp_path).hf.config
    settings = tmp_path / "processor_config.json"
    settings.write_text(json.dumps({"processor_class": "NoSuchProcessor"}))
    with pytest.raises(LoadError, match="has no NoSuchProcessor"):
        load_processor(tmp_path, config, "llava")
    settings.write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    with pytest.raises(LoadError, match="LlavaProcessor of 'llava'"):
        load_processor(tmp_path, config, "llava")
    settings.write_text("{")
    with pytest.raises(LoadError, match=r"processor_config\.json"):
        load_processor(tmp_path, config, "llava")


def test_a_package_that_a_processor_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("smolvlm", tmp_path)
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(LoadError, match=r"SmolVLMProcessor of .*num2words"):
        load(tmp_path)


# -- which class -------------------------------------------------------------------------------------------------------
def test_a_class_of_both_kinds_reads_images_when_it_has_a_vision_part(tmp_path: Path) -> None:
    def configured(name: str, **changes: Any) -> Any:
        config = tiny(name).hf.config
        for key, value in changes.items():
            setattr(config, key, value)
        return config

    assert has_images(configured("Gemma3ForConditionalGeneration"))
    assert not has_images(configured("Gemma3ForConditionalGeneration", vision_config=None))
    assert has_images(configured("LlavaForConditionalGeneration"))
    assert not has_images(configured("Gemma3ForCausalLM"))
    tiny("Gemma3ForConditionalGeneration").hf.save_pretrained(tmp_path)
    assert type(load(tmp_path).hf).__name__ == "Gemma3ForConditionalGeneration"


def test_a_tokenizer_alone_is_that_of_transformers(tmp_path: Path) -> None:
    save("llava", tmp_path)
    (tmp_path / "processor_config.json").unlink()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert load(tmp_path).processor("what is here")["input_ids"] == theirs("what is here")["input_ids"]


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 3), (SIDE, SIDE)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_a_picture_of_any_shape_is_read_or_refused_in_one_sentence(
    family: tuple[str, Path], size: tuple[int, int]
) -> None:
    name, folder = family
    model, picture = load(folder), Image.new("RGB", size)
    # Qwen's processor takes at most 200 times as long as wide; Pixtral's shrinks the short side to nothing.
    if (name.startswith("qwen") and size == (1, 500)) or (name in ("mistral3", "pixtral") and max(size) == 500):
        with pytest.raises(
            ImageError, match=rf"1 image\(s\) of {size[0]}x{size[1]} pixels: the processor refused them"
        ):
            model.inputs("what", image=picture)
        return
    inputs = model.inputs("what", image=picture)
    assert "image" in inputs.roles[0]
    if inputs.roles[0].count("image") > 1 or name != "mistral3":  # transformers' Mistral 3 takes no lone image position
        assert model(inputs).isfinite().all()
