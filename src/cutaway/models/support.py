"""Verify every architecture that the installed transformers knows, each built tiny from its own configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cutaway.core.errors import CutawayError
from cutaway.core.progress import track
from cutaway.models.doctor import examine, sentence
from cutaway.models.handle import Model
from cutaway.models.sites import refusals
from cutaway.models.tiny import architectures, tiny

Status = Literal["verified", "partly", "cannot be built"]
STATUSES: tuple[Status, ...] = ("verified", "partly", "cannot be built")


@dataclass(frozen=True)
class Support:
    """What holds of one class.

    Attributes:
        class_name, task: the class, as "causal-lm" or "image-text-to-text".
        status: "verified" when every site that its structure can have is there and every claim of the doctor holds.
        refused: reason per site that is refused although other models have it.
        failed: measured error per claim that does not hold.
        error: why it could not be built or watched at all.
    """

    class_name: str
    task: str
    status: Status
    refused: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, float] = field(default_factory=dict)
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """The form of ``cutaway doctor --architectures --json``; failed claims are in ``error``."""
        failed = "; ".join(f"{claim}: error {error:.2g}" for claim, error in self.failed.items())
        return {
            "class": self.class_name,
            "task": self.task,
            "status": self.status,
            "refused": dict(self.refused),
            "error": self.error or failed,
        }


def examine_class(class_name: str, task: str) -> Support:
    """What holds of one class, on a tiny model of it."""
    try:
        built = tiny(class_name, task)
    except CutawayError as error:
        return Support(class_name, task, "cannot be built", error=error.found)
    try:
        model = Model(built.hf, name=class_name)
        inputs = model.inputs(dict(built.inputs))
        found = examine(model, inputs)
    except Exception as error:  # noqa: BLE001 - whatever a model of a stranger raises belongs into the table
        return Support(class_name, task, "partly", {"all sites": sentence(error)}, error=sentence(error))
    refused = refusals(model.anatomy(inputs), task == "image-text-to-text")
    failed = {f.claim: f.error for f in found if not f.holds}
    return Support(class_name, task, "partly" if refused or failed else "verified", refused, failed)


def survey(classes: Iterable[tuple[str, str]] | None = None) -> list[Support]:
    """What holds of each (class, task); of every causal-LM and image-text-to-text class when none are named."""
    import transformers

    pairs = list(classes) if classes is not None else architectures()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return [examine_class(name, task) for name, task in track(pairs, "architectures")]
    finally:
        transformers.logging.set_verbosity(level)


def counts(found: Iterable[Support]) -> dict[str, dict[str, int]]:
    """How many classes of each task have each status."""
    table: dict[str, dict[str, int]] = {}
    for support in found:
        table.setdefault(support.task, dict.fromkeys(STATUSES, 0))[support.status] += 1
    return table
