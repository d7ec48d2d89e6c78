"""Draw the pictures of README and docs from the models that come with Cutaway: ``python -m tools.make_pictures``."""

from __future__ import annotations

from pathlib import Path

from cutaway.demo import steps

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
DRAWN = ("logit_lens", "patch_residual")


def main() -> None:
    """Write every picture."""
    PICTURES.mkdir(exist_ok=True)
    made = steps()
    for name in DRAWN:
        made[name][1].write(PICTURES / f"{name}.png")


if __name__ == "__main__":
    main()
