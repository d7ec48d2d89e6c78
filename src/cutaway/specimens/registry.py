"""The specimens that the package carries: their names, their cards, and the folder of each, its weights checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cutaway.core.errors import LoadError, WeightsError, nearest

HERE = Path(__file__).parent
CARD = "card.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What is known about a specimen.

    Attributes:
        name: what ``cutaway.load`` takes.
        title: one line.
        kind: "trained" (by gradient descent) or "built" (weights written by hand; truths exact).
        task: "causal-lm" or "image-text-to-text".
        architecture: the Hugging Face class.
        parameters: how many numbers; tied ones once.
        skills: what it can do.
        recipe: the command, in a checkout, that makes it again.
        data: the generator of its data, with its arguments.
        seed: of data and initial weights.
        accuracies: figure -> value in [0, 1], recomputed by ``evaluate``.
        truths: what is known about its insides (components, circuits, planted biases, held-out splits).
        examples: {"prompt", "answer"} (and "image", how to render it), each answered so by the model.
        notes: limits, said plainly.
        training: steps, seconds, machine, loss curve [[step, nats], ...]; empty when built.
        licence: of weights and data.
        size: bytes of the weights.
        sha256: weight file -> its digest.
    """

    name: str
    title: str
    kind: Literal["trained", "built"]
    task: Literal["causal-lm", "image-text-to-text"]
    architecture: str
    parameters: int
    skills: list[str]
    recipe: str
    data: str
    seed: int
    accuracies: dict[str, float]
    truths: dict[str, Any]
    examples: list[dict[str, Any]]
    licence: str
    size: int
    sha256: dict[str, str]
    notes: list[str] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes ``card.json`` into ``folder``."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        (folder / CARD).write_text(text + "\n", encoding="utf-8")


def names() -> tuple[str, ...]:
    """The names of the specimens, in alphabetical order."""
    return tuple(sorted(found.parent.name for found in HERE.glob(f"*/{CARD}")))


def card(name: str, where: Path | None = None) -> Card:
    """The card of a specimen; ``where`` is the folder of another set of specimens.

    Raises:
        LoadError: no specimen has this name; the nearest names are given.
        WeightsError: its card cannot be read.
    """
    try:
        return Card(**json.loads(((where or HERE) / _folder(name).name / CARD).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise WeightsError(f"specimen '{name}'", f"its card is damaged ({error})", _REINSTALL) from error


def path(name: str, revision: str | None = None) -> Path:
    """The folder of a specimen, a plain Hugging Face one, after its weight files were checked against the card.

    Args:
        revision: "step-400" for a checkpoint of a series that was trained here (``series.train``).

    Raises:
        LoadError: no specimen has this name, or its series no such revision; the nearest ones are given.
        WeightsError: a weight file is missing or is not the one that the card describes.
    """
    if revision is not None:
        from .series import revision_path

        return revision_path(name, revision)
    folder = _folder(name)
    for file, expected in card(name).sha256.items():
        if not (folder / file).is_file():
            raise WeightsError(f"specimen '{name}'", f"its file {file} is missing", _REINSTALL)
        found = digest(folder / file)
        if found != expected:
            raise WeightsError(
                f"specimen '{name}'", f"{file} has sha256 {found[:12]}, its card says {expected[:12]}", _REINSTALL
            )
    return folder


def digest(file: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_REINSTALL = "install cutaway again, or in a checkout run 'make specimens'"


def _folder(name: str) -> Path:
    if name not in names():
        hint = nearest(name, names()) or f"the specimens are {', '.join(names())}"
        raise LoadError(f"specimen '{name}'", "there is none of that name", hint)
    return HERE / name
