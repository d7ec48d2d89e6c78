"""Small valid inputs for a tiny model, from what its ``forward`` asks for; no tokenizer, no image processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cutaway.core.errors import UnsupportedError
from cutaway.models.tiny.pixels import arguments, pixels
from cutaway.models.tiny.rules import FIRST_SPECIAL, FIRST_WORD, IMAGE_TOKEN_NAMES

BEFORE, AFTER, TEXT_LENGTH = 4, 5, 12  # tokens before and after the image; tokens of a prompt without one
IMAGE_TYPE = 1  # what mm_token_type_ids and token_type_ids call an image position


def text_inputs(seed: int) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, both (batch 1, position 12)."""
    return _prompt(_words(TEXT_LENGTH, seed))


def image_inputs(model: Any, seed: int) -> dict[str, torch.Tensor]:
    """One image and a prompt around it: words, one placeholder per image position, words; and the pixels.

    Models that take the image through cross-attention or as a prefix of their own get words without placeholders;
    models that only decode from the image get ``decoder_input_ids``.
    """
    wanted = arguments(model)
    found = pixels(model, seed)
    if "input_ids" in wanted and not _reads_image_alone(model):
        count = image_positions(model, found)
        token = _image_token(model) if count else 0
        words = _words(BEFORE + AFTER if count else TEXT_LENGTH, seed)
        if count and (start := getattr(model.config, "vision_start_token_id", None)) is not None:
            words[BEFORE - 1] = start
        found |= _prompt(torch.cat([words[:BEFORE], torch.full((count,), token), words[BEFORE:]]))
        found |= _along_the_prompt(wanted, found, found["input_ids"] == token)
    decodes = model.config.is_encoder_decoder or hasattr(model.config, "canvas_length") or "input_ids" not in found
    if "decoder_input_ids" in wanted and decodes:
        found["decoder_input_ids"] = _words(TEXT_LENGTH, seed + 1)[None]
    return found


@torch.no_grad()
def image_positions(model: Any, found: Mapping[str, torch.Tensor]) -> int:
    """How many positions of the prompt the image fills: the rows of the features that the model makes of it."""
    if (latent := getattr(model.config, "latent_query_num", None)) is not None:
        return int(latent)  # Kosmos: learned queries stand for the image
    if "cross_attention_mask" in arguments(model):
        return 1  # Mllama: one token says where the image stands, its features come through cross-attention
    inside = getattr(model, "model", None)
    owners = (model, inside, getattr(inside, "encoder", None))
    names = ("get_image_features", "get_video_features")
    read = next((getattr(m, name) for m in owners for name in names if hasattr(m, name)), None)
    if read is None:
        return 0
    out = read(**found)
    rows = next(out[name] for name in ("pooler_output", "deepstack_features", "last_hidden_state") if name in out)
    if rows is out.get("deepstack_features"):
        rows = rows[0][1]  # Granite 4 Vision: (layer, features), alike for each layer
    parts = rows if isinstance(rows, (list, tuple)) else [rows]
    return sum(part.numel() // part.shape[-1] for part in parts)


def _along_the_prompt(
    wanted: Mapping[str, Any], found: Mapping[str, torch.Tensor], image: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Arguments that have one entry per position of the prompt; ``image`` says which positions the image fills."""
    one = torch.ones_like(found["input_ids"])
    tiles = found.get("aspect_ratio_mask", one[:, :1, None])
    made = {
        "mm_token_type_ids": image.long() * IMAGE_TYPE,
        "token_type_ids": image.long() * IMAGE_TYPE,
        "image_embeds_position_mask": image.long(),
        "cross_attention_mask": one[:, :, None, None] * tiles[:, None],
        "image_attention_mask": one[:, :, None],
        "bbox": one[:, :, None] * torch.tensor([10, 10, 20, 20]),
    }
    return {name: value for name, value in made.items() if name in wanted}


def _reads_image_alone(model: Any) -> bool:
    """An encoder-decoder whose encoder takes the image and no text."""
    return bool(model.config.is_encoder_decoder) and not (
        "bbox" in arguments(model) or hasattr(model, "get_image_features")
    )


def _prompt(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}


def _words(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(FIRST_SPECIAL - FIRST_WORD, generator=generator)[:count] + FIRST_WORD


def _image_token(model: Any) -> int:
    for name in (*IMAGE_TOKEN_NAMES, "image_patch_id", "video_token_index"):
        if getattr(model.config, name, None) is not None:
            return int(getattr(model.config, name))
    if "image_embeds_position_mask" in arguments(model):
        return FIRST_SPECIAL  # a mask marks the image, whatever the ids there
    raise UnsupportedError(f"tiny inputs of {type(model).__name__}", "its configuration names no image token")
