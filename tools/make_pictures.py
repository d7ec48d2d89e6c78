"""Draw the pictures of README and docs from the models that come with Cutaway: ``python -m tools.make_pictures``.

Names of pictures after it draw these alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from cutaway import catalog
from cutaway.core.result import Result
from cutaway.data import Scenes, Town
from cutaway.models.load import load

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
PAIR = {"clean": "Ada Reed lives in", "corrupt": "Ada Stone lives in", "metric": 'logprob: " Milby"'}
"""A fact of town that differs between two names."""
HALVED = 1000  # pixels: wider or taller pictures are kept at half their size


def on_town(method: str, **given: str) -> Result:
    """What a method finds in town."""
    return catalog.run(method, load("town"), **given)


def patch_residual() -> Result:
    """Which states carry a fact from one name to another."""
    town = load("town")
    pair = Town().pairs("city", count=1, length=lambda text: town.inputs(text).ids.shape[1])[0]
    metric = f'logit_diff: "{pair.clean.answer}", "{pair.corrupt.answer}"'
    return catalog.run("patch", town, clean=pair.clean.prompt, corrupt=pair.corrupt.prompt, metric=metric)


def image_patches() -> Result:
    """A place whose second word is read through the question's last token."""
    scene, asked = Scenes(seed=0).exam(5, "position")[4]
    first = asked.answer.split()[0]
    return catalog.run("image_patches", load("scenes"), prompt=f"{asked.prompt} {first}", image=scene.image())


DRAWN: dict[str, Callable[[], Result]] = {
    "causal_trace": lambda: on_town("causal_trace", prompt="Ada Reed lives in", subject="Ada Reed"),
    "edges": lambda: on_town("edges", **PAIR),
    "faithfulness": lambda: on_town("faithfulness", **PAIR),
    "image_patches": image_patches,
    "information_flow": lambda: on_town("information_flow", prompt="Ada Reed lives in"),
    "logit_lens": lambda: on_town("logit_lens", prompt="Cora Finch lives in"),
    "patch_residual": patch_residual,
}
"""What is drawn, by the picture's name."""


def small(picture: Path) -> None:
    """Keep a large picture at half its size: fewer colours would break the legends' gradients."""
    with Image.open(picture) as opened:
        if max(opened.size) <= HALVED:
            return
        half = opened.convert("RGB").resize((opened.width // 2, opened.height // 2), Image.Resampling.LANCZOS)
    half.save(picture, optimize=True)


def main(names: Sequence[str]) -> None:
    """Write the named pictures, or all."""
    PICTURES.mkdir(exist_ok=True)
    for name in names or DRAWN:
        small(DRAWN[name]().write(PICTURES / f"{name}.png"))


if __name__ == "__main__":
    main(sys.argv[1:])
