"""Makes every specimen again: ``python -m recipes.build_all [NAME ...]`` (about an hour and a half of one CPU core)."""

from __future__ import annotations

import importlib
import sys

# In this order: town-tuned starts from town.
RECIPES = ("planted", "two_towers", "circuit", "game", "recall", "labels", "town", "town_tuned", "scenes")


def main(chosen: list[str]) -> None:
    """Runs the recipes named, all of them by default."""
    unknown = sorted(set(chosen) - set(RECIPES))
    if unknown:
        sys.exit(f"no recipe is called {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    for name in RECIPES:
        if not chosen or name in chosen:
            importlib.import_module(f"recipes.{name}").main()


if __name__ == "__main__":
    main(sys.argv[1:])
