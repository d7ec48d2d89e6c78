"""Encoder: prompts of every form become the same inputs, padding does not matter, and what cannot be used is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cutaway.core.errors import ImageError, InputError, TokenError
from cutaway.core.inputs import Inputs
from cutaway.models.handle import Model
from cutaway.models.tiny import tiny

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MERGES = [("Ġ", "a"), ("Ġa", "n"), ("Ġan", "d"), ("o", "n")]


def letters(**options: Any) -> PreTrainedTokenizerFast:
    """Byte-level: single letters, " and" and "on"; "Paris" is five tokens."""
    pieces = ["<pad>", "<bos>", "<eos>", "<unk>", "Ġ", *LETTERS, *LETTERS.upper(), *(a + b for a, b in MERGES)]
    inner = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, MERGES, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if options.pop("begin", False):
        inner.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names, **options)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(tiny("LlamaForCausalLM").hf, letters())


@pytest.fixture(scope="module")
def bare() -> Model:
    return Model(tiny("LlamaForCausalLM").hf)


# -- forms -------------------------------------------------------------------------------------------------------------
def test_ids_of_every_form_are_the_same_inputs(bare: Model) -> None:
    ids = [5, 9, 7]
    forms: list[Any] = [
        ids, [ids], tuple(ids), torch.tensor(ids), torch.tensor([ids]), [torch.tensor(ids)], np.array(ids),
        np.array([ids]), [np.int64(i) for i in ids], {"input_ids": [ids]}, {"input_ids": torch.tensor(ids)},
        {"input_ids": np.array([ids]), "attention_mask": [[1, 1, 1]]},
    ]  # fmt: skip
    assert {bare.inputs(form).digest for form in forms} == {bare.inputs(ids).digest}
    inputs = bare.inputs(ids)
    assert bare.inputs(inputs) is inputs
    assert (inputs.tokens, inputs.roles) == ((("#5", "#9", "#7"),), (("text",) * 3,))


def test_what_a_tokenizer_gives_is_taken(model: Model) -> None:
    given = model.encoder.tokenizer(["cab and", "on"], padding=True, return_tensors="pt")
    assert model.inputs(given).digest == model.inputs(["cab and", "on"]).digest
    listed = model.encoder.tokenizer(["cab and", "on"], padding=True)
    assert model.inputs(listed).digest == model.inputs(["cab and", "on"]).digest


def test_tokens_and_roles_of_a_text() -> None:
    model = Model(tiny("LlamaForCausalLM").hf, letters(begin=True))
    inputs = model.inputs(["on and", "b"])
    assert inputs.tokens == (("<bos>", "on", " and"), ("<bos>", "b", "<pad>"))
    assert inputs.roles == (("special", "text", "text"), ("special", "text", "pad"))
    assert (inputs.lengths, inputs.last, inputs.padded) == ([3, 2], [2, 1], True)


def test_a_chat_template_wraps_a_text() -> None:
    tokenizer = letters()
    tokenizer.chat_template = (
        "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}on{% endif %}"
    )
    model = Model(tiny("LlamaForCausalLM").hf, tokenizer)
    assert model.inputs("cab", template=True).tokens == (("<bos>", "c", "a", "b", "on"),)


# -- padding -----------------------------------------------------------------------------------------------------------
PADDED = [
    "GPT2LMHeadModel", "LlamaForCausalLM", "OPTForCausalLM", "BloomForCausalLM", "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM", "Qwen2ForCausalLM", "FalconForCausalLM", "GPTJForCausalLM",
]  # fmt: skip


@pytest.mark.parametrize("name", PADDED)
def test_the_side_of_the_padding_does_not_matter(name: str) -> None:
    model, rows = Model(tiny(name).hf), [[70, 71, 72, 73, 74, 75, 76], [80, 81, 82], [90]]
    sites = ["L*.resid_post", "L*.attn.z"]
    alone = [model.trace(row, want=sites) for row in rows]
    for side in ("left", "right"):
        inputs = model.inputs(rows, padding_side=side)
        assert inputs.ids.shape == (3, 7)
        trace = model.trace(inputs, want=sites)
        for b, one in enumerate(alone):
            real = inputs.real[b]
            assert real == (list(range(7 - len(rows[b]), 7)) if side == "left" else list(range(len(rows[b]))))
            assert torch.allclose(trace.logits[b, real], one.logits[0], atol=1e-5)
            for site, value in trace.items():
                assert torch.allclose(value[b, real], one[site][0], atol=1e-5), (side, b, site)


def test_any_id_may_fill(bare: Model) -> None:
    assert bare.encoder.pad_id < bare.encoder.vocabulary_size
    inputs = bare.inputs([[70, 71, 72], [80]])
    other = Inputs(inputs.ids.masked_fill(inputs.mask == 0, 77), inputs.mask, inputs.tokens, inputs.roles)
    assert torch.equal(bare(inputs)[1, 0], bare(other)[1, 0])


# -- one token ---------------------------------------------------------------------------------------------------------
def test_one_token_by_text_and_by_number(model: Model, bare: Model) -> None:
    assert model.token("on") == model.token(f"#{model.token('on')}") == model.token(model.token("on"))
    assert model.decode(model.token(" and")) == " and"
    assert (bare.token("#11"), bare.decode(11)) == (11, "#11")


def test_a_text_of_several_tokens_says_how_it_is_split(model: Model) -> None:
    with pytest.raises(
        TokenError, match=r"'cab': it is split into 3 tokens: 'c' #7, 'a' #5, 'b' #6; .*'answer: #7, #5, #6'"
    ):
        model.token("cab")
    with pytest.raises(TokenError, match=r'with a leading space it is one token: " and"'):
        model.token("and")


def test_what_is_no_token_is_named(model: Model, bare: Model) -> None:
    with pytest.raises(TokenError, match=r"token #128: the vocabulary has ids 0-127"):
        model.token("#128")
    with pytest.raises(TokenError, match=r"token #-1"):
        model.token(-1)
    with pytest.raises(TokenError, match="the tokenizer does not know it"):
        model.token("7")
    with pytest.raises(TokenError, match="the tokenizer does not know it"):
        model.token("")
    with pytest.raises(TokenError, match="without a tokenizer"):
        bare.token("on")


# -- what cannot be used -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "it is empty"),
        ([], "got nothing"),
        (None, "got nothing"),
        ([[]], "it has no tokens"),
        ([[5], []], "it has no tokens"),
        (7, "got int"),
        (1.5, "got float"),
        ([1.5, 2.5], "got float among its rows"),
        ([5, "on"], "got list among its rows"),
        ([None], "got nothing among its rows"),
        ([[5, None]], "got list among its rows"),
        (torch.zeros(2, 3), "float32"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"\[1, 2, 3\]"),
        (np.zeros(3), "float64"),
        (torch.zeros(0, dtype=torch.long), "it has no tokens"),
        ([5, 128], "token #128"),
        (torch.tensor([-1, 5]), "token #-1"),
        ({"input_ids": [[5, 128]]}, "token #128"),
        ({"input_ids": [[5], [6, 7]]}, "rows of unequal length"),
        ({"input_ids": [[]]}, r"got \[1, 0\]"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, r"input_ids \[1, 2\] and attention_mask \[1, 1\]"),
        ({"input_ids": [[5, 6]], "attention_mask": [[0, 0]]}, "no real token"),
        ({"text": "on"}, r"a mapping with \['text'\]"),
    ],
    ids=str,
)
def test_a_prompt_that_cannot_be_used_is_named(model: Model, prompt: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        model.inputs(prompt)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", [lambda n: [5] * n, lambda n: "on" * n, lambda n: {"input_ids": [[5] * n]}])
def test_a_prompt_longer_than_the_positions_says_both(model: Model, form: Callable[[int], Any]) -> None:
    limit = model.hf.config.max_position_embeddings
    assert model.inputs(form(limit)).ids.shape == (1, limit)
    with pytest.raises(InputError, match=f"it has {limit + 1} tokens and the model {limit} positions"):
        model.inputs(form(limit + 1))


def test_text_needs_a_tokenizer(bare: Model) -> None:
    with pytest.raises(InputError, match=r"prompt 'Ada': the model was made without a tokenizer; give token ids"):
        bare.inputs("Ada")


def test_a_chat_template_must_be_there(model: Model) -> None:
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        model.inputs("on", template=True)


def test_there_are_two_sides(model: Model) -> None:
    with pytest.raises(InputError, match="padding_side='middle'"):
        model.inputs("on", padding_side="middle")


# -- images ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from cutaway.models.load import load
    from tests.unit.models.vlm_folders import save

    folder = tmp_path_factory.mktemp("llava")
    save("llava", folder)
    return load(folder)


def test_an_image_is_a_picture_or_its_path(seeing: Model, tmp_path: Path) -> None:
    picture = Image.linear_gradient("L").resize((40, 40))
    picture.save(tmp_path / "a.png")
    by_path = [seeing.inputs("what", image=str(tmp_path / "a.png")), seeing.inputs("what", image=tmp_path / "a.png")]
    inputs = seeing.inputs("what", image=picture)
    assert {i.digest for i in by_path} == {inputs.digest}
    assert inputs.images[0].mode == "RGB"
    assert inputs.tokens[0][-1] == "what"
    assert seeing.inputs("what <image>", image=picture).tokens[0][0] == "what"


def test_an_image_that_cannot_be_used_is_named(seeing: Model, model: Model, tmp_path: Path) -> None:
    cut = tmp_path / "cut.png"
    Image.linear_gradient("L").save(cut)
    cut.write_bytes(cut.read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    for image, said in (
        (tmp_path / "none.png", "no such file"),
        (tmp_path, "a folder"),
        (tmp_path / "text.png", "it cannot be read as an image"),
        (cut, "it cannot be read as an image"),
        (torch.zeros(3, 8, 8), "got Tensor"),
    ):
        with pytest.raises(ImageError, match=said):
            seeing.inputs("what", image=image)
    with pytest.raises(ImageError, match="LlamaForCausalLM was loaded without an image processor"):
        model.inputs("what", image=Image.new("RGB", (8, 8)))
    with pytest.raises(InputError, match="got 2 texts; give one text per call"):
        seeing.inputs(["what", "is"], image=Image.new("RGB", (8, 8)))
    with pytest.raises(InputError, match="got Tensor; give one text per call"):
        seeing.inputs(torch.tensor([5, 6]), image=Image.new("RGB", (8, 8)))
    with pytest.raises(
        ImageError, match=r"2 image\(s\) of 8x8, 9x9 pixels: the processor refused them.*one placeholder for each image"
    ):
        seeing.inputs("what <image>", image=[Image.new("RGB", (8, 8)), Image.new("RGB", (9, 9))])


def test_a_place_for_an_image_needs_one(seeing: Model) -> None:
    token = next(iter(seeing.encoder.image_ids))
    said = "it has a place for an image, '<image>', and none is given; give one"
    forms: list[Any] = ["what <image>", ["what", "<image> is"], [5, token, 6], {"input_ids": [[5, token]]}]
    for form in forms:
        with pytest.raises(ImageError, match=said):
            seeing.inputs(form)
    features = seeing.inputs("what <image>", image=Image.new("RGB", (8, 8))).kwargs("cpu")
    assert seeing.inputs(features).has_images


def test_an_image_needs_a_place_in_the_prompt(seeing: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.new("RGB", (8, 8))
    assert seeing.inputs("what", image=picture).digest == seeing.inputs("<image>what", image=picture).digest
    words = Model(seeing.hf, seeing.processor)
    monkeypatch.setattr(words.encoder, "_place_images", lambda prompt, n: prompt)  # a template that puts none there
    monkeypatch.setattr(type(words.processor), "__call__", lambda self, text, **_: self.tokenizer(text))
    with pytest.raises(ImageError, match="the prompt has no place for it; write '<image>' where it belongs"):
        words.inputs("what", image=picture)


def test_an_empty_text_is_no_prompt(model: Model, bare: Model, seeing: Model) -> None:
    for form in ("", ["on", ""]):
        with pytest.raises(InputError, match=r"prompt '': it is empty; give .*; the start token alone is written '#1'"):
            model.inputs(form)
    with pytest.raises(InputError, match=r"it is empty; give a text or token ids\.$"):
        bare.inputs("")
    with pytest.raises(InputError, match="it is empty"):
        seeing.inputs("", image=Image.new("RGB", (8, 8)))
    assert model.inputs([1]).tokens == (("<bos>",),)
