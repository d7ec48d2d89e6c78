"""Small valid inputs for a tiny model, from what its ``forward`` asks for; no tokenizer, no image processor."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from cutaway.core.errors import UnsupportedError
from cutaway.models.tiny.rules import FIRST_SPECIAL, FIRST_WORD

BEFORE, AFTER, TEXT_LENGTH = 4, 5, 12  # tokens before and after the image; tokens of a prompt without one
IMAGE_TYPE = 1  # what mm_token_type_ids and token_type_ids call an image position


def text_inputs(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, both (batch 1, position 12)."""
    ids = _words(TEXT_LENGTH, seed)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_inputs(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """One image inside a prompt: words, one placeholder per image position, words; and the pixels."""
    wanted = inspect.signature(type(model).forward).parameters
    pixels = _pixels(model, wanted, seed)
    count = image_positions(model, pixels)
    words = _words(BEFORE + AFTER, seed)
    ids = torch.cat([words[:BEFORE], torch.full((count,), _image_token(model)), words[BEFORE:]])[None]
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    types = (ids == _image_token(model)).long() * IMAGE_TYPE
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in wanted:
            found[name] = types
    return found


@torch.no_grad()
def image_positions(model: nn.Module, pixels: Mapping[str, torch.Tensor]) -> int:
    """How many positions of the prompt the image fills: the rows of the features that the model makes of it."""
    features: Callable[..., Any] | None = getattr(model, "get_image_features", None)
    if features is None:
        features = getattr(getattr(model, "model", None), "get_image_features", None)
    if features is None:
        raise UnsupportedError(f"tiny inputs of {type(model).__name__}", "the model has no get_image_features")
    out = features(**pixels)
    rows = getattr(out, "pooler_output", out)
    parts = rows if isinstance(rows, (list, tuple)) else [rows]
    return sum(part.numel() // part.shape[-1] for part in parts)


def _words(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(FIRST_SPECIAL - FIRST_WORD, generator=generator)[:count] + FIRST_WORD


def _image_token(model: nn.Module) -> int:
    for name in ("image_token_id", "image_token_index", "img_context_token_id"):
        if getattr(model.config, name, None) is not None:
            return int(getattr(model.config, name))
    raise UnsupportedError(f"tiny inputs of {type(model).__name__}", "its configuration names no image token")


def _pixels(model: nn.Module, wanted: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """The image arguments of ``forward``, told apart by the other arguments that it has."""
    vision = getattr(model.config, "vision_config", None)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    channels = next((getattr(vision, n) for n in ("num_channels", "in_channels", "in_chans") if hasattr(vision, n)), 3)
    side = _side(vision)
    if "image_grid_thw" in wanted:  # a flat list of patches and the grid that they fill
        patch, time = vision.patch_size, getattr(vision, "temporal_patch_size", 1)
        grid = torch.tensor([[1, 4, 4]])
        return {"pixel_values": noise(int(grid.prod()), channels * time * patch * patch), "image_grid_thw": grid}
    if "pixel_attention_mask" in wanted:  # several images per prompt, padded to one size
        mask = torch.ones(1, 1, side, side, dtype=torch.bool)
        return {"pixel_values": noise(1, 1, channels, side, side), "pixel_attention_mask": mask}
    sizes = torch.tensor([[side, side]])
    if "image_sizes" in inspect.signature(getattr(model, "get_image_features", _pixels)).parameters:
        if getattr(model.config, "image_grid_pinpoints", None):  # an overview tile and the tiles of the image
            height, width = model.config.image_grid_pinpoints[0]
            tiles = 1 + math.prod((height // side, width // side))
            sizes = torch.tensor([[height, width]])
            return {"pixel_values": noise(1, tiles, channels, side, side), "image_sizes": sizes}
        return {"pixel_values": noise(1, channels, side, side), "image_sizes": sizes}
    return {"pixel_values": noise(1, channels, side, side)}


def _side(vision: Any) -> int:
    size = getattr(vision, "image_size", None)
    return int(size[0] if isinstance(size, (list, tuple)) else size) if size else 32
