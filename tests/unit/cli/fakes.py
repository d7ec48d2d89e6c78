"""A model that computes nothing, and a package of methods that need no more."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

from cutaway import catalog
from cutaway.core.errors import LoadError, TokenError

WORDS = ["cat", "dog", " Paris", " London", "#", '"', ",", "\n", "-", " ", "@", "\\", "[", "é"]


class StubModel:
    """What parameters and provenance ask of a model."""

    dtype = torch.float32
    device = torch.device("cpu")
    devices = (device,)
    n_layers = 4

    def __init__(self, name: str = "stub", digest: str = "d0") -> None:
        self.name, self.digest = name, digest

    def token(self, text: str | int) -> int:
        if isinstance(text, str) and text.startswith("#") and text[1:].isdigit():
            return int(text[1:])
        if isinstance(text, int):
            return text
        if text not in WORDS:
            raise TokenError(f"token {text!r}", "it is none of the vocabulary")
        return WORDS.index(text)


GLANCE = '''
from __future__ import annotations

from typing import Literal

from cutaway.core.method import method
from cutaway.core.params import Count, Layers, MetricLike, Prompts, Sites, Target
from cutaway.results.grid import Grid
from tests.unit.cli.fakes import StubModel


@method(cites="nobody", example={"prompt": "cat", "layers": "0-1"})
def glance(
    model: StubModel,
    prompt: Prompts,
    *,
    target: Target | None = None,
    layers: Layers = "*",
    sites: Sites = "L*.attn.z[0]",
    metric: MetricLike | None = None,
    k: Count = 3,
    scale: float = 1.0,
    how: Literal["plain", "bold"] = "plain",
    centre: bool = True,
    seed: int = 0,
) -> Grid:
    """Layer numbers, scaled.

    More about [it],
    and about ``L3.attn.z[5]``.

    Args:
        prompt: what the model
            reads.
        layers: which layers.
        scale: factor.
    """
    values = [[scale * layer + (0 if target is None else target)] * len(prompt) for layer in layers]
    return Grid(title=f"glance {how}", values=values, axes=("layer", "row"), labels={"layer": tuple(layers)})
'''

STARE = '''
from __future__ import annotations

from cutaway.core.method import method
from cutaway.core.params import Prompt
from cutaway.results.grid import Grid
from tests.unit.cli.fakes import StubModel


@method(example={"prompt": "cat"})
def stare(model: StubModel, prompt: Prompt, fail: str = "", drift: Grid | None = None) -> Grid:
    """Not a number, or a failure.

    Args:
        prompt: what the model reads.
        fail: what to fail with.
        drift: a grid made before.
    """
    if fail == "interrupt":
        raise KeyboardInterrupt
    if fail:
        raise ZeroDivisionError(f"{fail}\\nand more")
    values = [[float("nan"), 1.0]] if drift is None else drift.values
    return Grid(title="stare", values=values, axes=("a", "b"))
'''


def install(folder: Path, patch: pytest.MonkeyPatch, name: str, sources: dict[str, str]) -> None:
    """Makes ``sources`` ("stage/name.py" -> text) the catalog's package of methods."""
    package = folder / name
    for path, text in sources.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text, encoding="utf-8")
    patch.syspath_prepend(str(folder))
    patch.setattr(catalog, "PACKAGE", name)
    for module in [each for each in sys.modules if each.split(".")[0] == name]:
        patch.delitem(sys.modules, module)


def install_loader(patch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Makes ``cutaway.models.load`` hand out stub models; returns the list of what it is asked for."""
    asked: list[dict[str, object]] = []

    def load(ref: str, **options: object) -> StubModel:
        if ref == "nowhere":
            raise LoadError(f"model {ref!r}", "there is none of that name")
        asked.append({"ref": ref, **options})
        return StubModel(ref)

    module = types.ModuleType("cutaway.models.load")
    module.load = load  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "cutaway.models.load", module)
    return asked
