"""Draw the pictures of README and docs from the models that come with Cutaway: ``python -m tools.make_pictures``."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from cutaway import catalog
from cutaway.core.result import Result
from cutaway.data import Scenes
from cutaway.demo import steps
from cutaway.models.load import load

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
DRAWN = ("logit_lens", "patch_residual")


def image_patches() -> Result:
    """A place whose second word is read through the question's last token."""
    scene, asked = Scenes(seed=0).exam(5, "position")[4]
    first = asked.answer.split()[0]
    return catalog.run("image_patches", load("scenes"), prompt=f"{asked.prompt} {first}", image=scene.image())


def circuits() -> dict[str, Result]:
    """The edges behind a fact of town that differ between two names, and the circuits that they make."""
    town, given = load("town"), {"clean": "Ada Reed lives in", "corrupt": "Ada Stone lives in"}
    return {name: catalog.run(name, town, **given, metric='logprob: " Milby"') for name in ("edges", "faithfulness")}


def small(picture: Path) -> None:
    """Keep a large picture at half its size: fewer colours would break the legends' gradients."""
    with Image.open(picture) as opened:
        half = opened.convert("RGB").resize((opened.width // 2, opened.height // 2), Image.Resampling.LANCZOS)
    half.save(picture, optimize=True)


def main() -> None:
    """Write every picture."""
    PICTURES.mkdir(exist_ok=True)
    made = steps()
    for name in DRAWN:
        made[name][1].write(PICTURES / f"{name}.png")
    for name, result in circuits().items():
        small(result.write(PICTURES / f"{name}.png"))
    small(image_patches().write(PICTURES / "image_patches.png"))


if __name__ == "__main__":
    main()
