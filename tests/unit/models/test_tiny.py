"""Tiny models: every architecture the project promises is built from its config, runs, and repeats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cutaway.core.errors import UnsupportedError
from cutaway.models.tiny import TinyModel, architectures, tiny

CAUSAL = [
    "BloomForCausalLM", "CohereForCausalLM", "DeepseekV3ForCausalLM", "FalconForCausalLM", "GPT2LMHeadModel",
    "GPTJForCausalLM", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM",
    "GptOssForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM",
    "OPTForCausalLM", "Olmo2ForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM",
]  # fmt: skip
IMAGE_TEXT = [
    "Gemma3ForConditionalGeneration", "Idefics3ForConditionalGeneration", "InternVLForConditionalGeneration",
    "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration", "LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration", "PaliGemmaForConditionalGeneration", "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration", "SmolVLMForConditionalGeneration",
]  # fmt: skip
# Kinds that the promised classes lack: hybrids, encoders read left to right, cross-attention, encoder-decoders.
OTHERS = [
    ("BertLMHeadModel", "causal-lm"), ("Gemma4ForCausalLM", "causal-lm"), ("JambaForCausalLM", "causal-lm"),
    ("Qwen3NextForCausalLM", "causal-lm"), ("Florence2ForConditionalGeneration", "image-text-to-text"),
    ("IdeficsForVisionText2Text", "image-text-to-text"), ("MllamaForConditionalGeneration", "image-text-to-text"),
    ("Lfm2VlForConditionalGeneration", "image-text-to-text"),
    ("Pix2StructForConditionalGeneration", "image-text-to-text"),
]  # fmt: skip
PROMISED = [(name, "causal-lm") for name in CAUSAL] + [(name, "image-text-to-text") for name in IMAGE_TEXT]
RELOADED = [
    "GPT2LMHeadModel", "Qwen3MoeForCausalLM", "LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
]  # fmt: skip


def logits(model: TinyModel) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(**model.inputs).logits


@pytest.mark.parametrize(("name", "task"), PROMISED)
def test_a_promised_class_builds_runs_and_repeats(name: str, task: str) -> None:
    made = tiny(name, task)
    first = logits(made)
    assert (made.class_name, made.task, type(made.hf).__name__) == (name, task, name)
    assert torch.isfinite(first).all()
    assert first.std(-1).min() > 0.1, "logits nearly constant: the weights do not matter"
    assert torch.equal(first, logits(made)), "the same model answers differently the second time"
    assert torch.equal(first, logits(tiny(name, task))), "the seed does not fix the model"
    assert not made.hf.training
    assert {p.dtype for p in made.hf.parameters()} == {torch.float32}
    assert sum(p.numel() for p in made.hf.parameters()) < 2_000_000


@pytest.mark.parametrize(("name", "task"), OTHERS)
def test_other_kinds_build_and_repeat(name: str, task: str) -> None:
    made = tiny(name, task)
    first = logits(made)
    assert torch.isfinite(first).all()
    assert torch.equal(first, logits(tiny(name, task)))


@pytest.mark.parametrize("name", [*CAUSAL, "BertLMHeadModel", "JambaForCausalLM"])
def test_a_later_token_does_not_change_an_earlier_answer(name: str) -> None:
    made = tiny(name)
    before = logits(made)
    made.inputs["input_ids"][0, -1] -= 1
    change = (logits(made) - before)[0].abs().amax(-1)
    assert change[:-1].max() < 1e-5
    assert change[-1] > 1e-3


@pytest.mark.parametrize("name", IMAGE_TEXT)
def test_the_prompt_holds_one_placeholder_per_image_position(name: str) -> None:
    made = tiny(name, "image-text-to-text")
    ids, token = made.inputs["input_ids"][0], made.hf.config.image_token_id
    image = (ids == token).nonzero().flatten().tolist()
    assert image == list(range(image[0], image[-1] + 1))
    assert len(image) >= 4
    assert image[0] >= 1, "no words before the image"
    assert len(ids) - image[-1] - 1 >= 3, "too few words after the image"
    short = {**made.inputs, "input_ids": ids[None].clone()}
    short["input_ids"][0, image[0]] = ids[0]
    with torch.no_grad(), pytest.raises(ValueError, match="do not match"):
        made.hf(**short)  # one placeholder fewer is one too few


@pytest.mark.parametrize("name", IMAGE_TEXT)
def test_the_image_reaches_the_answer(name: str) -> None:
    made = tiny(name, "image-text-to-text")
    before = logits(made)
    made.inputs["pixel_values"] = made.inputs["pixel_values"].flip(-1)
    assert (logits(made)[0, -1] - before[0, -1]).abs().max() > 1e-4


def test_another_seed_is_another_model() -> None:
    assert not torch.equal(logits(tiny("LlamaForCausalLM", seed=0)), logits(tiny("LlamaForCausalLM", seed=1)))


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    tiny("LlamaForCausalLM")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", RELOADED)
def test_a_saved_model_opens_to_the_same_logits(name: str, tmp_path: Path) -> None:
    made = tiny(name)
    made.hf.save_pretrained(tmp_path)
    again = type(made.hf).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(made), again(**made.inputs).logits)


def test_every_bias_and_norm_is_off_its_initial_value() -> None:
    vectors = {n: p for n, p in tiny("GPT2LMHeadModel").hf.named_parameters() if p.dim() == 1}
    assert vectors
    for name, vector in vectors.items():
        common = 1.0 if "ln" in name and name.endswith("weight") else 0.0
        assert (vector != common).all(), name
        assert (vector - common).abs().max() < 1, name


def test_layers_of_every_kind_are_kept() -> None:
    config = tiny("Gemma3ForCausalLM").hf.config
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.sliding_window < tiny("Gemma3ForCausalLM").inputs["input_ids"].shape[1]
    dense, *sparse = (type(layer.mlp).__name__ for layer in tiny("DeepseekV3ForCausalLM").hf.model.layers)
    assert dense.endswith("MLP")
    assert all(name.endswith("MoE") for name in sparse)


def test_a_hybrid_keeps_an_attention_layer() -> None:
    assert set(tiny("Qwen3NextForCausalLM").hf.config.layer_types) == {"linear_attention", "full_attention"}
    assert set(tiny("BambaForCausalLM").hf.config.layers_block_type) == {"linear_attention", "full_attention"}


def test_an_encoder_decoder_is_given_what_it_decodes() -> None:
    made = tiny("Pix2StructForConditionalGeneration")
    assert set(made.inputs) == {"flattened_patches", "decoder_input_ids"}
    assert logits(made).shape[:2] == made.inputs["decoder_input_ids"].shape


def test_config_overrides_reach_sub_configurations() -> None:
    made = tiny("LlavaForConditionalGeneration", text_config__num_hidden_layers=1, vision_config__num_hidden_layers=3)
    assert (made.hf.config.text_config.num_hidden_layers, made.hf.config.vision_config.num_hidden_layers) == (1, 3)


def test_another_depth_shortens_the_lists_with_one_entry_per_layer() -> None:
    assert tiny("Gemma2ForCausalLM", num_hidden_layers=2).hf.config.layer_types == [
        "sliding_attention",
        "full_attention",
    ]
    assert len(tiny("Gemma2ForCausalLM", num_hidden_layers=5).hf.model.layers) == 5


@pytest.mark.parametrize("name", ["hiden_size", "vision_config__hidden_size"])
def test_an_attribute_that_the_configuration_lacks_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="no such attribute"):
        tiny("LlamaForCausalLM", **{name: 32})


def test_a_class_of_two_tasks_is_text_only_as_causal_lm() -> None:
    assert ("Gemma3ForConditionalGeneration", "causal-lm") in architectures()
    assert set(tiny("Gemma3ForConditionalGeneration").inputs) == {"input_ids", "attention_mask"}


def test_architectures_are_sorted_and_unique() -> None:
    pairs = architectures()
    assert pairs == sorted(set(pairs))
    assert {task for _, task in pairs} == {"causal-lm", "image-text-to-text"}


def test_an_unknown_class_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM"):
        tiny("LlamoForCausalLM")


def test_a_class_that_cannot_run_alone_says_why() -> None:
    with pytest.raises(UnsupportedError, match="drafts tokens for another model"):
        tiny("Gemma4AssistantForCausalLM")


def test_a_configuration_that_transformers_refuses_is_refused_with_its_reason() -> None:
    with pytest.raises(UnsupportedError, match="not a multiple of the number of attention heads"):
        tiny("LlamaForCausalLM", hidden_size=65)


def test_a_task_that_the_class_does_not_serve_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="serves causal-lm"):
        tiny("LlamaForCausalLM", "image-text-to-text")
