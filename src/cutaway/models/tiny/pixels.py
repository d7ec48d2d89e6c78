"""The image arguments of a model's ``forward``: which shape pixels take follows from the other arguments it has."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from cutaway.models.tiny.rules import FIRST_WORD, IMAGE, PATCH

GRID = (4, 4)  # patches down and across
CELLS = math.prod(GRID)
CHANNELS = 3

Pixels = dict[str, torch.Tensor]
Noise = Callable[..., torch.Tensor]


def arguments(model: Any) -> Mapping[str, Any]:
    """The arguments of ``forward`` by name."""
    return inspect.signature(type(model).forward).parameters


def pixels(model: Any, seed: int) -> Pixels:
    """Everything that describes the image, drawn from ``seed``."""
    noise = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    vision = getattr(model.config, "vision_config", None) or getattr(model.config, "encoder", None) or model.config
    if own := BY_CLASS.get(type(model).__name__):
        return own(vision, noise)
    wanted = arguments(model)
    for name, builder in BY_ARGUMENT.items():
        if name in wanted:
            return builder(vision, noise)
    side = _side(vision)
    if "image_sizes" in wanted and "image_sizes" in inspect.signature(_features(model)).parameters:
        if pinpoints := getattr(model.config, "image_grid_pinpoints", None):
            return _tiles(pinpoints[0], side, noise)
        return {"pixel_values": noise(1, CHANNELS, side, side), "image_sizes": torch.tensor([[side, side]])}
    return {"pixel_values": noise(1, CHANNELS, side, side)}


def _features(model: Any) -> Callable[..., Any]:
    owner = model if hasattr(model, "get_image_features") else model.model
    return owner.get_image_features


def _side(vision: Any) -> int:
    size = getattr(vision, "image_size", None) or IMAGE
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _times(vision: Any) -> int:
    return next((int(getattr(vision, n)) for n in ("temporal_patch_size", "patch_temporal") if hasattr(vision, n)), 1)


def _tiles(size: list[int], side: int, noise: Noise) -> Pixels:
    """LLaVA-NeXT: the whole image as one tile, then the tiles that cover it; (image, tile, channel, height, width)."""
    count = 1 + math.prod(length // side for length in size)
    return {"pixel_values": noise(1, count, CHANNELS, side, side), "image_sizes": torch.tensor([size])}


def _flat(vision: Any, noise: Noise) -> Pixels:
    """Qwen-VL: patches in one row, (patch, channel x time x height x width), and the grid that they fill."""
    grid = torch.tensor([[1, *GRID]])
    return {"pixel_values": noise(CELLS, CHANNELS * _times(vision) * PATCH**2), "image_grid_thw": grid}


def _flat_still(vision: Any, noise: Noise) -> Pixels:
    return {"pixel_values": noise(CELLS, CHANNELS * PATCH**2), "image_grid_hw": torch.tensor([GRID])}


def _square(vision: Any, noise: Noise) -> Pixels:
    """Kimi, PaddleOCR-VL: (patch, channel, height, width)."""
    return {"pixel_values": noise(CELLS, CHANNELS, PATCH, PATCH), "image_grid_thw": torch.tensor([[1, *GRID]])}


def _strip(vision: Any, noise: Noise) -> Pixels:
    """MiniCPM-V: all patches side by side in one strip, (1, channel, patch height, patches x patch width)."""
    sizes = torch.tensor([GRID], dtype=torch.int32)
    return {"pixel_values": noise(1, CHANNELS, PATCH, CELLS * PATCH), "target_sizes": sizes}


def _native(vision: Any, noise: Noise) -> Pixels:
    """LFM2-VL: (image, patch, values of the patch), the grid, and which patches are not padding."""
    return {
        "pixel_values": noise(1, CELLS, CHANNELS * PATCH**2),
        "spatial_shapes": torch.tensor([GRID]),
        "pixel_attention_mask": torch.ones(1, CELLS, dtype=torch.long),
    }


def _placed(vision: Any, noise: Noise) -> Pixels:
    """Gemma 4: patches in [0, 1] with the column and row of each."""
    cell = PATCH * (vision.pooling_kernel_size if not hasattr(vision, "hidden_size") else 1)
    side = 2 * (vision.pooling_kernel_size if hasattr(vision, "hidden_size") else 1)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    where = torch.stack([column, row], dim=-1).reshape(1, -1, 2)
    return {"pixel_values": noise(1, side**2, CHANNELS * cell**2).sigmoid(), "image_position_ids": where}


def _several(vision: Any, noise: Noise) -> Pixels:
    """Idefics 2 and 3: several images per prompt, padded to one size; (batch, image, channel, height, width)."""
    side = _side(vision)
    mask = torch.ones(1, 1, side, side, dtype=torch.bool)
    return {"pixel_values": noise(1, 1, CHANNELS, side, side), "pixel_attention_mask": mask}


def _docling(vision: Any, noise: Noise) -> Pixels:
    side = _side(vision)
    mask = torch.ones(1, 1, dtype=torch.bool)
    return {"pixel_values": noise(1, 1, CHANNELS, side, side), "pixel_attention_mask": mask}


def _merged_by_call(vision: Any, noise: Noise) -> Pixels:
    """VideoLLaMA 3: how many patches are merged is an argument."""
    return {**_flat(vision, noise), "image_merge_sizes": torch.tensor([2])}


def _two_resolutions(vision: Any, noise: Noise) -> Pixels:
    side = _side(vision)
    return {
        "pixel_values": noise(1, CHANNELS, side, side),
        "high_res_pixel_values": noise(1, CHANNELS, side, side),
    }


def _questioned(vision: Any, noise: Noise) -> Pixels:
    """InstructBLIP: the Q-Former reads the question too."""
    side = _side(vision)
    ids = torch.arange(FIRST_WORD, FIRST_WORD + 5)[None]
    return {
        "pixel_values": noise(1, CHANNELS, side, side),
        "qformer_input_ids": ids,
        "qformer_attention_mask": torch.ones_like(ids),
    }


def _questioned_video(vision: Any, noise: Noise) -> Pixels:
    found = _questioned(vision, noise)
    return {**found, "pixel_values": found["pixel_values"][:, None]}


def _tiled(vision: Any, noise: Noise) -> Pixels:
    """Mllama: (batch, image, tile, channel, height, width), one tile in use."""
    side, tiles = _side(vision), vision.max_num_tiles
    mask = torch.zeros(1, 1, tiles, dtype=torch.long)
    mask[..., 0] = 1
    return {
        "pixel_values": noise(1, 1, tiles, CHANNELS, side, side),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": mask,
    }


def _one_per_prompt(vision: Any, noise: Noise) -> Pixels:
    """Idefics 1: (batch, image, channel, height, width)."""
    side = _side(vision)
    return {"pixel_values": noise(1, 1, CHANNELS, side, side)}


def _rows_and_columns(vision: Any, noise: Noise) -> Pixels:
    """Pix2Struct: each patch with its row and column in front."""
    row, column = torch.meshgrid(torch.arange(1, GRID[0] + 1), torch.arange(1, GRID[1] + 1), indexing="ij")
    where = torch.stack([row, column], dim=-1).reshape(1, CELLS, 2).float()
    return {"flattened_patches": torch.cat([where, noise(1, CELLS, CHANNELS * PATCH**2)], dim=-1)}


def _rows_columns_and_size(vision: Any, noise: Noise) -> Pixels:
    size = torch.tensor([IMAGE])
    return {**_rows_and_columns(vision, noise), "width": size, "height": size}


def _pooled(vision: Any, noise: Noise) -> Pixels:
    """Molmo 2: patches of one crop, and which four patches each image position averages."""
    down, across = GRID[0] // 2, GRID[1] // 2
    cells = torch.arange(CELLS).reshape(down, 2, across, 2).transpose(1, 2).reshape(down * across, 4)
    return {
        "pixel_values": noise(1, CELLS, CHANNELS * PATCH**2),
        "image_token_pooling": cells,
        "image_grids": torch.tensor([[down, across, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    }


def _channels_last(vision: Any, noise: Noise) -> Pixels:
    """Inkling 2: (merged patch, height, width, channel)."""
    merge = vision.spatial_merge_size
    grid = torch.tensor([[1, GRID[0] // merge, GRID[1] // merge]])
    return {
        "pixel_values": noise(int(grid.prod()), merge * PATCH, merge * PATCH, CHANNELS),
        "image_grid_thw": grid,
    }


def _volumes(vision: Any, noise: Noise) -> Pixels:
    """Inkling: (patch, time, height, width, channel)."""
    return {"pixel_values": noise(CELLS, _times(vision), PATCH, PATCH, CHANNELS)}


def _patch_rows(vision: Any, noise: Noise) -> Pixels:
    """Fuyu: patches go straight into the language model."""
    return {"pixel_values": noise(1, CELLS, CHANNELS * vision.patch_size**2)}


def _protein(vision: Any, noise: Noise) -> Pixels:
    """Evolla reads a protein where others read an image."""
    ids = torch.arange(5, 15)[None]
    return {"protein_input_ids": ids, "protein_attention_mask": torch.ones_like(ids)}


def _robot(config: Any, noise: Noise) -> Pixels:
    """PI0: a camera picture, the robot's state, and actions to be denoised."""
    side = _side(config.vlm_config.vision_config)
    return {
        "pixel_values": noise(1, 1, CHANNELS, side, side),
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
        "state": noise(1, config.max_state_dim),
        "noise": noise(1, config.chunk_size, config.max_action_dim),
        "timestep": torch.tensor([0.5]),
    }


# The first argument found decides.
BY_ARGUMENT: dict[str, Callable[[Any, Noise], Pixels]] = {
    "image_merge_sizes": _merged_by_call,
    "image_grid_thw": _flat,
    "image_grid_hw": _flat_still,
    "image_token_pooling": _pooled,
    "target_sizes": _strip,
    "spatial_shapes": _native,
    "image_position_ids": _placed,
    "tile_fine_mask": _docling,
    "pixel_attention_mask": _several,
    "high_res_pixel_values": _two_resolutions,
    "qformer_input_ids": _questioned,
    "aspect_ratio_ids": _tiled,
    "image_attention_mask": _one_per_prompt,
    "width": _rows_columns_and_size,
    "flattened_patches": _rows_and_columns,
    "image_patches": _patch_rows,
    "protein_input_ids": _protein,
}

# Same arguments, another layout of the pixels.
BY_CLASS: dict[str, Callable[[Any, Noise], Pixels]] = {
    "DiffusionGemmaForBlockDiffusion": _placed,
    "Inkling2ForConditionalGeneration": _channels_last,
    "InklingForConditionalGeneration": _volumes,
    "InstructBlipVideoForConditionalGeneration": _questioned_video,
    "Kimi_K25ForConditionalGeneration": _square,
    "PI0ForConditionalGeneration": _robot,
    "PaddleOCRVLForConditionalGeneration": _square,
}
