"""A prompt that a specimen answers, with its image where it needs one: what commands run when none is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cutaway.core.errors import LoadError

from . import registry
from .series import CACHE_VARIABLE, cache_folder


def example(name: str, number: int = 0) -> dict[str, str]:
    """Parameters of a method, as text: ``prompt``, and ``image`` where the example has one.

    The image is drawn by the generator that the card names, and kept in the cache folder: a file can be named again.

    Raises:
        LoadError: no specimen has this name, or the cache folder cannot be written.
    """
    found = registry.card(name).examples[number]
    about = found.get("image")
    return {"prompt": found["prompt"], **({"image": str(_drawn(about))} if about else {})}


def _drawn(about: dict[str, Any]) -> Path:
    """The file of a scene."""
    from cutaway.data import Scenes

    kind, number = about["kind"], about["number"]
    path = cache_folder() / "examples" / f"scenes-{kind.replace(' ', '-')}-{number}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Scenes(seed=0).exam(number + 1, kind)[number][0].image().save(path)
    except OSError as error:
        found = f"it cannot be written ({error.strerror})"
        raise LoadError(f"cache folder '{path.parent}'", found, f"set {CACHE_VARIABLE} to another") from error
    return path
