"""Draw the pictures of README and docs from the models that come with Cutaway: ``python -m tools.make_pictures``."""

from __future__ import annotations

from pathlib import Path

from cutaway.demo import steps

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"


def main() -> None:
    """Write every picture."""
    PICTURES.mkdir(exist_ok=True)
    for name, (_, result) in steps().items():
        if name != "doctor":
            result.write(PICTURES / f"{name}.png")


if __name__ == "__main__":
    main()
