"""ImageMap: scores of image patches, laid over the image."""

from __future__ import annotations

import base64
import io
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cutaway.core.errors import ResultError
from cutaway.core.result import Array, over
from cutaway.results import drawing
from cutaway.results.kind import Kind

if TYPE_CHECKING:
    import pandas
    from PIL.Image import Image

PNG_HEAD, SIZE_AT = b"\x89PNG\r\n\x1a\n", slice(16, 24)
WIDEST, TALLEST, ACROSS = 280, 320, 3
LARGEST = 1024  # pixels across of the picture that is kept of an image
EDGES = ("left", "top", "right", "bottom")
VEIL = (0.0, 0.75)  # opacity of the weakest and of the strongest patch


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ImageMap(Kind, kind="imagemap"):
    """One or more maps of patch scores over one image.

    Args:
        image: the bytes of a PNG file, uint8 [byte]; ``ImageMap.png`` makes them from a Pillow image.
        values: scores [map, row, column] over the patch grid, in ``unit``, never rescaled; NaN where there is no
            patch. A single map may be given as [row, column]. Label ``map`` with the maps' names.
        boxes: pixel edges (left, top, right, bottom) of each patch [row, column, edge]; an even grid when absent.
        measure: what a score is; scale: "diverging" or "sequential".
        figures: numbers about the maps as a whole, by name.
        pixels: width and height of the image that boxes are given in, where the PNG is a smaller picture of it.
    """

    image: Array = field(metadata=over("byte"))
    values: Array = field(metadata=over("map", "row", "column"))
    boxes: Array = field(default=None, metadata=over("row", "column", "edge"))
    measure: str = "score"
    scale: str = "diverging"
    figures: dict[str, float] = field(default_factory=dict)
    pixels: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.image, bytes):
            object.__setattr__(self, "image", np.frombuffer(self.image, dtype=np.uint8))
        if getattr(self.values, "ndim", len(np.shape(self.values))) == 2:
            object.__setattr__(self, "values", self.values[None] if hasattr(self.values, "ndim") else [self.values])
        if self.boxes is None:
            rows, cols = np.shape(self.values)[-2:]
            size = self.pixels or png_size(bytes(np.asarray(self.image)))
            object.__setattr__(self, "boxes", even_boxes(rows, cols, *size))
        super().__post_init__()
        png_size(self.image.tobytes())
        if self.scale not in ("diverging", "sequential"):
            raise ResultError(f"scale={self.scale!r}", "no such colour scale", "use 'diverging' or 'sequential'")
        if self.boxes.shape[-1] != 4:
            raise ResultError("patch boxes", f"{self.boxes.shape[-1]} numbers each", "give left, top, right, bottom")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image in pixels."""
        return self.pixels or png_size(self.image.tobytes())

    @staticmethod
    def png(image: Image) -> np.ndarray:
        """The bytes of a Pillow image as a PNG file, uint8 [byte]; a large one is made smaller: give ``pixels``."""
        buffer = io.BytesIO()
        small = image.convert("RGB")
        small.thumbnail((LARGEST, LARGEST))
        small.save(buffer, format="PNG")
        return np.frombuffer(buffer.getvalue(), dtype=np.uint8)

    def table(self) -> pandas.DataFrame:
        """One row per map and patch: the score and the patch's box in pixels."""
        table = self.long_table("values").rename(columns={"values": "score"})
        maps = self.values.shape[0]
        for i, edge in enumerate(EDGES):
            table[edge] = np.tile(self.boxes[..., i].ravel(), maps)
        return table

    def agreement(self) -> pandas.DataFrame:
        """One row per pair of maps: Pearson and Spearman correlation over the patches, and whether both have the same
        patch on top. NaN where a map has one value everywhere."""
        import pandas

        names = self.along("map")
        flat = self.values.reshape(len(names), -1)
        frame = pandas.DataFrame(flat[:, np.isfinite(flat).all(axis=0)].T)
        pearson, spearman, top = frame.corr(), frame.corr(method="spearman"), frame.idxmax()
        rows = [
            (names[i], names[j], pearson[i][j], spearman[i][j], bool(top[i] == top[j]))
            for i in range(len(names))
            for j in range(i + 1, len(names))
        ]
        return pandas.DataFrame(rows, columns=["map", "other", "pearson", "spearman", "same_top"])

    def highlights(self) -> pandas.DataFrame:
        """Patches from the strongest to the weakest."""
        return self.table().sort_values("score", key=abs, ascending=False, kind="stable")

    def spec(self, map: Any = None, own_scale: bool = False) -> drawing.Spec:
        """The image, then every map over it (or the one labelled ``map``): colour and veil grow with the score.

        Maps share one colour scale, unless ``own_scale`` gives each its own: then colours do not compare across maps.
        """
        names = self.along("map") if "map" in self.labels or len(self.values) > 1 else (drawing.named(self.measure),)
        chosen = list(range(len(names))) if map is None else [self.option("map", map, "map")]
        wide, tall = self.size
        zoom = min(WIDEST / wide, TALLEST / tall)
        frame = {"width": round(wide * zoom, 1), "height": round(tall * zoom, 1)}
        x: drawing.Spec = {"type": "quantitative", "axis": None, "scale": {"domain": [0, wide], "nice": False}}
        y: drawing.Spec = {"type": "quantitative", "axis": None}
        y["scale"] = {"domain": [0, tall], "nice": False, "reverse": True}
        photo = {
            "data": {"name": "image"},
            "mark": {"type": "image", **frame, "align": "left", "baseline": "top", "aspect": False},
            "encoding": {"x": {"datum": 0, **x}, "y": {"datum": 0, **y}, "url": {"field": "url", "type": "nominal"}},
        }
        panels: list[drawing.Spec] = [{**frame, "title": _panel("image"), "layer": [photo]}]
        rows: list[dict[str, Any]] = []
        for n, i in enumerate(chosen):
            judged = self.values[i] if own_scale else self.values[chosen]
            rows += self._patches(n, self.values[i], judged)
            colors = drawing.color(self._title(), judged, self.scale == "diverging", length=frame["height"])
            panels.append(
                {
                    **frame,
                    "title": _panel(drawing.shown(names[i], 30)),
                    "layer": [photo, *_patch_marks(n, colors, x, y)],
                }
            )
        url = "data:image/png;base64," + base64.b64encode(self.image.tobytes()).decode()
        body = {"data": {"values": rows}, "datasets": {"image": [{"url": url}]}, "concat": panels, "columns": ACROSS}
        if own_scale:
            body["resolve"] = {"scale": {"color": "independent"}}
        return drawing.document(body, drawing.heading(self.title, *self.caption()))

    def _title(self) -> str:
        return drawing.named(self.measure, self.unit)

    def _patches(self, number: int, values: np.ndarray, judged: np.ndarray) -> list[dict[str, Any]]:
        signed = self.scale == "diverging"
        low, high = drawing.signed_domain(judged) if signed else drawing.domain(judged)
        rows = []
        for r, c in np.ndindex(values.shape):
            value = float(values[r, c])
            row = {"map": number, "row": r, "column": c, "value": drawing.finite(value), "shown": drawing.digits(value)}
            row |= zip(EDGES, self.boxes[r, c].tolist(), strict=True)
            row["strength"] = drawing.finite(abs(value) / high if signed else (value - low) / (high - low))
            rows.append(row)
        return rows


def _patch_marks(number: int, colors: drawing.Spec, x: drawing.Spec, y: drawing.Spec) -> list[drawing.Spec]:
    """The patches of one map: coloured where there is a score, grey where there is none."""
    patch = {
        "x": {"field": "left", **x},
        "x2": {"field": "right"},
        "y": {"field": "top", **y},
        "y2": {"field": "bottom"},
        "tooltip": [{"field": each, "type": "ordinal"} for each in ("row", "column")]
        + [{"field": "shown", "type": "nominal", "title": colors["legend"]["title"]}],
    }
    veil: drawing.Spec = {"field": "strength", "type": "quantitative", "legend": None}
    veil["scale"] = {"type": "sqrt", "domain": [0, 1], "range": list(VEIL)}
    return [
        {
            "transform": [{"filter": f"datum.map === {number} && isValid(datum.value)"}],
            "mark": {"type": "rect"},
            "encoding": {**patch, "color": colors, "opacity": veil},
        },
        {
            "transform": [{"filter": f"datum.map === {number} && !isValid(datum.value)"}],
            "mark": {"type": "rect", "style": "missing", "opacity": VEIL[1]},
            "encoding": patch,
        },
    ]


def _panel(text: str) -> drawing.Spec:
    return {"text": text, "fontSize": 11, "fontWeight": 500, "anchor": "middle", "offset": 6}


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height from a PNG's head."""
    if not data.startswith(PNG_HEAD) or len(data) < SIZE_AT.stop:
        raise ResultError("an image map", "its image is not a PNG file", "use ImageMap.png(pillow_image)")
    width, height = struct.unpack(">II", data[SIZE_AT])
    return int(width), int(height)


def even_boxes(rows: int, columns: int, width: int, height: int) -> np.ndarray:
    """Boxes of an even patch grid over the image, [row, column, edge] in pixels."""
    across, down = np.linspace(0, width, columns + 1), np.linspace(0, height, rows + 1)
    boxes = np.empty((rows, columns, 4), dtype=np.float32)
    boxes[..., 0], boxes[..., 2] = across[:-1], across[1:]
    boxes[..., 1], boxes[..., 3] = down[:-1, None], down[1:, None]
    return boxes
