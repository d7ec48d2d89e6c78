"""Tiny vision-language models with real processors, saved as the folders that ``save_pretrained`` writes.

Every family has its own class of transformers, its own image processor, and a tokenizer of a few words with the special
tokens that its processor asks for, at the ids that the model's configuration gives them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cutaway.models.processor import NoVideo, _class, without_video
from cutaway.models.tiny import tiny

SIDE, PATCH = 32, 8
WORDS = "what is here the a red blue square where question one two three".split()
ROW_COLUMN = [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
LONG = {"text_config__max_position_embeddings": 512}


@dataclass(frozen=True)
class Family:
    """How to make one: class of the model, class and settings of its processors, names of its special tokens."""

    model: str
    processor: str
    images: str
    image_settings: dict[str, Any]
    tokens: dict[str, str]  # attribute of the configuration -> token
    settings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)  # attribute of the tokenizer -> token
    tower: dict[str, Any] | None = None  # another vision tower than the class's own


CLIP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
EXACT = {"size": {"height": SIDE, "width": SIDE}}
ANYRES = [[32, 64], [64, 32], [64, 64]]
QWEN = {"patch_size": PATCH, "merge_size": 2, "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}}
QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip
PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "head_dim": 8, "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
IDEFICS = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
IDEFICS_OTHERS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>", "\n", *ROW_COLUMN)
SELECT = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}

FAMILIES = {
    "llava": Family(
        "LlavaForConditionalGeneration", "LlavaProcessor", "LlavaImageProcessor", CLIP, {"image_token_id": "<image>"},
        SELECT,
    ),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration", "PaliGemmaProcessor", "SiglipImageProcessor",
        {**EXACT, "image_seq_length": 16}, {"image_token_id": "<image>"}, named={"image_token": "<image>"},
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration", "Gemma3Processor", "Gemma3ImageProcessor", EXACT,
        {"image_token_id": "<image_soft_token>", "boi_token_index": "<start_of_image>",
         "eoi_token_index": "<end_of_image>"},
        {"image_seq_length": 4}, others=("\n\n",),
        named={"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    ),
    "idefics3": Family(
        "Idefics3ForConditionalGeneration", "Idefics3Processor", "Idefics3ImageProcessor", IDEFICS,
        {"image_token_id": "<image>"}, {"image_seq_len": 4}, LONG, IDEFICS_OTHERS,
    ),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration", "SmolVLMProcessor", "SmolVLMImageProcessor", IDEFICS,
        {"image_token_id": "<image>"}, {"image_seq_len": 4}, LONG, IDEFICS_OTHERS,
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration", "Qwen2VLProcessor", "Qwen2VLImageProcessor", QWEN, QWEN_TOKENS,
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", QWEN, QWEN_TOKENS,
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration", "Qwen3VLProcessor", "Qwen2VLImageProcessor", QWEN, QWEN_TOKENS,
    ),
    "vipllava": Family(
        "VipLlavaForConditionalGeneration", "LlavaProcessor", "LlavaImageProcessor", CLIP,
        {"image_token_id": "<image>"}, SELECT,
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeForConditionalGeneration", "Qwen3VLProcessor", "Qwen2VLImageProcessor", QWEN, QWEN_TOKENS,
    ),
    "qwen3_5": Family(
        "Qwen3_5ForConditionalGeneration", "Qwen3VLProcessor", "Qwen2VLImageProcessor", QWEN, QWEN_TOKENS,
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeForConditionalGeneration", "Qwen3VLProcessor", "Qwen2VLImageProcessor", QWEN, QWEN_TOKENS,
    ),
    "pixtral": Family(
        "LlavaForConditionalGeneration", "PixtralProcessor", "PixtralImageProcessor",
        {"size": {"longest_edge": SIDE}, "patch_size": PATCH}, {"image_token_id": "[IMG]"}, {"patch_size": PATCH},
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}, ("[IMG_BREAK]", "[IMG_END]"),
        tower=PIXTRAL,
    ),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration", "LlavaNextProcessor", "LlavaNextImageProcessor",
        {**CLIP, "image_grid_pinpoints": ANYRES}, {"image_token_id": "<image>"}, SELECT,
        {**LONG, "image_grid_pinpoints": ANYRES},
    ),
    "llava_onevision": Family(
        "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor",
        {**EXACT, "image_grid_pinpoints": ANYRES}, {"image_token_id": "<image>", "video_token_id": "<video>"},
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        {**LONG, "image_grid_pinpoints": ANYRES},
    ),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration", "PixtralProcessor", "PixtralImageProcessor",
        {"size": {"longest_edge": SIDE}, "patch_size": PATCH}, {"image_token_id": "[IMG]"},
        {"patch_size": PATCH, "spatial_merge_size": 2}, others=("[IMG_BREAK]", "[IMG_END]"),
    ),
    "internvl": Family(
        "InternVLForConditionalGeneration", "InternVLProcessor", "GotOcr2ImageProcessor",
        {**EXACT, "max_patches": 4}, {"image_token_id": "<IMG_CONTEXT>"}, {"image_seq_length": 4},
        {**LONG, "vision_config__image_size": [SIDE, SIDE], "vision_config__patch_size": [PATCH, PATCH]},
        named={"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
               "video_token": "<video>"},
    ),
}  # fmt: skip


def tokenizer(family: Family, config: Any) -> PreTrainedTokenizerFast:
    """Words between spaces, and the family's special tokens at the ids of the configuration."""
    fixed = {token: int(getattr(config, attribute)) for attribute, token in family.tokens.items()}
    free = iter(i for i in range(128) if i not in fixed.values())
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *family.others, *family.named.values(), *WORDS]
    vocabulary = {**{name: next(free) for name in dict.fromkeys(names) if name not in fixed}, **fixed}
    vocabulary |= {f"word{i}": i for i in free}  # every id is a token: what a processor adds comes behind
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(list(dict.fromkeys([*fixed, *family.others, *family.named.values()])))
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, extra_special_tokens=family.named, model_max_length=512, **names
    )


def save(name: str, folder: Path, template: str | None = None) -> Any:
    """Saves a family's model and processor into ``folder``; returns the Hugging Face module."""
    import transformers

    family = FAMILIES[name]
    hf: Any = tiny(family.model, "image-text-to-text", **family.config).hf
    if family.tower is not None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = hf.config.to_dict() | {"vision_config": family.tower}
            hf = type(hf)(type(hf.config).from_dict(config)).eval()
    hf.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": family.processor}))
    cls = _class(folder, hf.config)
    images: Callable[..., Any] = getattr(transformers, family.images)
    parts = {"image_processor": images(**family.image_settings), "tokenizer": tokenizer(family, hf.config)}
    if "video_processor" in cls.get_attributes():
        cls, parts["video_processor"] = without_video(cls), NoVideo(num_frames=8, fps=1)
    cls(**parts, **family.settings, chat_template=template).save_pretrained(folder)
    return hf
