"""Which pixels of the image each image position stands for.

Every family cuts an image into tiles, and each tile into a uniform grid of patches, in reading order. A reader per
family says the tiles; what joins tiles to token positions is the same for all. A family that is not in ``FAMILIES``,
or whose tiles do not add up to the image positions that there are, gets no grid: nothing is guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from cutaway.core.inputs import Inputs, PatchGrid

ROW_AND_COLUMN, WHOLE = re.compile(r"<row_(\d+)_col_(\d+)>"), "<global-img>"  # Idefics 3, SmolVLM
LARGEST_RATIO = 1.1  # LLaVA-OneVision shrinks a grid that has this many times (squared) the patches allowed


@dataclass(frozen=True)
class Size:
    """Height and width, in pixels or in patches."""

    height: float
    width: float


@dataclass(frozen=True)
class Window:
    """A part of the image in its own pixels; it may reach beyond the edges where the image was padded."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Tile:
    """A grid of patches over a window of an image, and the image positions around them that are no patches.

    Attributes:
        size: of the image it belongs to; the very object that the scene has for it.
        rows, columns: of the grid.
        before, row_end, after: positions in front of the grid, after each row, and behind the grid.
    """

    size: Size
    window: Window
    rows: int
    columns: int
    before: int = 0
    row_end: int = 0
    after: int = 0


@dataclass(frozen=True)
class Scene:
    """What a reader looks at."""

    inputs: Inputs
    config: Any
    processor: Any
    sizes: list[Size]
    positions: list[int]

    @property
    def pixels(self) -> Tensor:
        """The pixels as the model takes them."""
        return self.inputs.extra["pixel_values"]

    @property
    def patch(self) -> int:
        """Side of a patch of the vision tower, in pixels."""
        return _side(self.config.vision_config.patch_size)


def patch_grids(inputs: Inputs, config: Any, processor: Any) -> tuple[PatchGrid, ...]:
    """One grid per tile of each image: the pixels of the image as given that each image position stands for.

    Patches that lie in the padding around an image have an empty box, at its edge. () for a family that is not known.
    """
    reader = _reader(config)
    positions = [p for p, role in enumerate(inputs.roles[0]) if role == "image"]
    if reader is None or len(inputs) != 1 or not inputs.images or not positions:
        return ()
    sizes = [Size(image.height, image.width) for image in inputs.images]
    tiles = list(reader(Scene(inputs, config, processor, sizes, positions)))
    taken = sum(t.before + t.rows * (t.columns + t.row_end) + t.after for t in tiles)
    if not tiles or taken != len(positions):
        return ()
    left = iter(positions)
    number = {id(size): i for i, size in enumerate(sizes)}
    return tuple(_grid(tile, left, number[id(tile.size)]) for tile in tiles)


def _grid(tile: Tile, left: Iterator[int], image: int) -> PatchGrid:
    list(islice(left, tile.before))
    found: list[int] = []
    for _ in range(tile.rows):
        found += islice(left, tile.columns)
        list(islice(left, tile.row_end))
    list(islice(left, tile.after))
    window = tile.window
    x = torch.linspace(window.left, window.right, tile.columns + 1).clamp(0, tile.size.width)
    y = torch.linspace(window.top, window.bottom, tile.rows + 1).clamp(0, tile.size.height)
    rows, columns = torch.meshgrid(torch.arange(tile.rows), torch.arange(tile.columns), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    boxes = torch.stack([x[columns], y[rows], x[columns + 1], y[rows + 1]], dim=1)
    return PatchGrid(row=0, positions=tuple(found), boxes=boxes, shape=(tile.rows, tile.columns), image=image)


def _side(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def _all(size: Size) -> Window:
    return Window(0, 0, size.width, size.height)


# -- readers: one per way of cutting an image --------------------------------------------------------------------------
def _one_tile(scene: Scene) -> Iterator[Tile]:
    """One square of patches per image (LLaVA, PaliGemma; Gemma 3 pools them), with a class token in front or not."""
    height, width = scene.pixels.shape[-2:]
    count, rest = divmod(len(scene.positions), len(scene.sizes))
    if rest or scene.pixels.shape[0] != len(scene.sizes):
        return
    rows = math.isqrt(round(count * height / width))
    columns = rows * width // height
    for size in scene.sizes:
        window = _seen(scene.processor.image_processor, size, Size(height, width))
        if window is not None:
            yield Tile(size, window, rows, columns, before=count - rows * columns)


def _merged(scene: Scene) -> Iterator[Tile]:
    """Patches merged two by two or so (Qwen-VL); the image is only resized."""
    merge = scene.config.vision_config.spatial_merge_size
    for size, (_, rows, columns) in zip(scene.sizes, scene.inputs.extra["image_grid_thw"].tolist(), strict=False):
        yield Tile(size, _all(size), rows // merge, columns // merge)


def _lines(scene: Scene) -> Iterator[Tile]:
    """As many rows and columns as the resized image has (Pixtral); what ends a row is another token."""
    unit = scene.patch * getattr(scene.config, "spatial_merge_size", 1)
    for size, (height, width) in zip(scene.sizes, scene.inputs.extra["image_sizes"].tolist(), strict=False):
        yield Tile(size, _all(size), height // unit, width // unit)


def _any_resolution(scene: Scene) -> Iterator[Tile]:
    """The image as one square, then large, in the shape that fits best, with a position after each row (LLaVA-NeXT)."""
    from transformers.image_processing_utils import select_best_resolution

    side = _side(scene.config.vision_config.image_size)
    across = side // scene.patch
    for size in scene.sizes:
        best = Size(*select_best_resolution((size.height, size.width), scene.config.image_grid_pinpoints))
        scale = min(best.width / size.width, best.height / size.height)
        if best.width / size.width < best.height / size.height:
            resized = Size(min(math.ceil(size.height * scale), best.height), best.width)
        else:
            resized = Size(best.height, min(math.ceil(size.width * scale), best.width))
        rows, columns = int(best.height // side * across), int(best.width // side * across)
        top, left = _padded_patches(size, rows, columns)
        window = Window(left, top, columns - left, rows - top)
        x, y = size.width / resized.width, size.height / resized.height
        pad_x, pad_y = (best.width - resized.width) // 2, (best.height - resized.height) // 2
        unit = scene.patch
        window = Window(
            (window.left * unit - pad_x) * x, (window.top * unit - pad_y) * y,
            (window.right * unit - pad_x) * x, (window.bottom * unit - pad_y) * y,
        )  # fmt: skip
        rows, columns = _bounded(scene, rows - 2 * top, columns - 2 * left, across)
        yield Tile(size, _all(size), across, across)
        yield Tile(size, window, rows, columns, row_end=1)


def _padded_patches(size: Size, rows: int, columns: int) -> tuple[int, int]:
    """Rows of patches above (and below), and columns beside, that hold nothing but padding and are left out."""
    if size.width / size.height > columns / rows:
        return (rows - int(round(size.height * (columns / size.width), 7))) // 2, 0
    return 0, (columns - int(round(size.width * (rows / size.height), 7))) // 2


def _bounded(scene: Scene, rows: int, columns: int, across: int) -> tuple[int, int]:
    """Rows and columns after a grid with too many patches was shrunk (LLaVA-OneVision)."""
    limit = re.search(r"anyres_max_(\d+)", str(getattr(scene.config, "vision_aspect_ratio", "")))
    ratio = math.sqrt(rows * columns / (int(limit[1]) * across**2)) if limit else 1
    return (int(rows // ratio), int(columns // ratio)) if ratio > LARGEST_RATIO else (rows, columns)


def _named(scene: Scene) -> Iterator[Tile]:
    """Tiles that the token in front of each names by row and column, then the whole image (Idefics 3, SmolVLM)."""
    tokens, runs = scene.inputs.tokens[0], _runs(scene.positions)
    sizes, places = iter(scene.sizes), []
    for start, length in runs:
        name = tokens[start - 1] if start else ""
        if match := ROW_AND_COLUMN.fullmatch(name):
            places.append((int(match[1]), int(match[2])))
            continue
        size = next(sizes, None)
        if name != WHOLE or size is None:
            return
        side, down, over = (
            math.isqrt(length),
            max((r for r, _ in places), default=1),
            max((c for _, c in places), default=1),
        )
        height, width = size.height / down, size.width / over
        for r, c in places:
            yield Tile(size, Window((c - 1) * width, (r - 1) * height, c * width, r * height), side, side)
        yield Tile(size, _all(size), side, side)
        places = []


def _runs(positions: list[int]) -> list[tuple[int, int]]:
    """(start, length) of each row of positions without a gap."""
    starts = [p for p in positions if p - 1 not in set(positions)]
    inside = set(positions)
    return [(s, next(n for n in range(1, len(positions) + 1) if s + n not in inside)) for s in starts]


def _canvas(scene: Scene) -> Iterator[Tile]:
    """Tiles in reading order over the whole image, then the whole image once more (InternVL)."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    pixels, images = scene.pixels, scene.processor.image_processor
    height, width = pixels.shape[-2:]
    side = math.isqrt(len(scene.positions) // len(pixels))
    for size in scene.sizes:
        over, down = 1, 1
        if len(pixels) > len(scene.sizes):
            asked = (int(size.height), int(size.width)), (height, width), images.min_patches, images.max_patches
            over, down = get_optimal_tiled_canvas(*asked)
        x, y = size.width / over, size.height / down
        for i in range(over * down if over * down > 1 else 0):
            r, c = divmod(i, over)
            yield Tile(size, Window(c * x, r * y, (c + 1) * x, (r + 1) * y), side, side)
        yield Tile(size, _all(size), side, side)


def _seen(images: Any, size: Size, made: Size) -> Window | None:
    """The window that the pixels of size ``made`` show, after padding, resizing and cropping; None when not known."""
    x = y = 0.0
    width, height = size.width, size.height
    if getattr(images, "do_pad", False) and hasattr(images, "pad_to_square"):
        width = height = max(size.width, size.height)
        x, y = (width - size.width) // 2, (height - size.height) // 2
    resized = _resized(images, Size(height, width))
    if resized is None:
        return None
    top = left = 0.0
    if getattr(images, "do_center_crop", False):
        top, left = (resized.height - made.height) // 2, (resized.width - made.width) // 2
    elif resized != made:
        return None
    x_scale, y_scale = width / resized.width, height / resized.height
    return Window(
        left * x_scale - x, top * y_scale - y, (left + made.width) * x_scale - x, (top + made.height) * y_scale - y
    )


def _resized(images: Any, size: Size) -> Size | None:
    if not getattr(images, "do_resize", False):
        return size
    to: Mapping[str, Any] = {k: v for k, v in dict(images.size).items() if v is not None}
    if set(to) == {"height", "width"}:
        return Size(to["height"], to["width"])
    if set(to) != {"shortest_edge"}:
        return None
    short = to["shortest_edge"]
    long = int(short * max(size.height, size.width) / min(size.height, size.width))
    return Size(long, short) if size.width <= size.height else Size(short, long)


Reader = Callable[[Scene], Iterator[Tile]]
FAMILIES: dict[str, Reader] = {
    **dict.fromkeys(("llava", "vipllava", "paligemma", "gemma3"), _one_tile),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _merged),
    **dict.fromkeys(("mistral3",), _lines),
    **dict.fromkeys(("llava_next", "llava_onevision"), _any_resolution),
    **dict.fromkeys(("idefics3", "smolvlm"), _named),
    "internvl": _canvas,
}


def _reader(config: Any) -> Reader | None:
    tower = getattr(getattr(config, "vision_config", None), "model_type", "")
    return _lines if tower == "pixtral" else FAMILIES.get(config.model_type)
