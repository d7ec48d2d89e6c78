"""Training series: a specimen trained anew with checkpoints on the way, kept in a cache folder of the user.

A checkpoint is a plain Hugging Face folder, named as a revision: ``town@step-400``. Beside the newest one lies what
training needs to go on, so a run that was killed is repeated from there and ends as an unbroken one would.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutaway.core.errors import LoadError, ParameterError, nearest

if TYPE_CHECKING:
    from .making.plans import Plan

CACHE_VARIABLE = "CUTAWAY_CACHE"
FIRST_SHARE = 1 / 40  # of the steps: what happens before the first checkpoint after 0 shows nothing
_RESUME, _SERIES = "resume.pt", "series.json"

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True, slots=True)
class Series:
    """The checkpoints of a specimen's training.

    Attributes:
        name: of the specimen.
        folder: where its checkpoints lie.
        steps: training steps of the checkpoints that are complete, in order.
        planned: training steps of all checkpoints.
    """

    name: str
    folder: Path
    steps: tuple[int, ...]
    planned: tuple[int, ...]

    @property
    def revisions(self) -> tuple[str, ...]:
        """What ``cutaway.load`` takes: "town@step-0", "town@step-100", ..."""
        return tuple(f"{self.name}@step-{step}" for step in self.steps)

    @property
    def is_complete(self) -> bool:
        return self.steps == self.planned


def cache_folder() -> Path:
    """Where series are kept: ``$CUTAWAY_CACHE``, else ``$XDG_CACHE_HOME/cutaway``, else ``~/.cache/cutaway``."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cutaway"


def spaced(steps: int, checkpoints: int) -> tuple[int, ...]:
    """``checkpoints`` steps from 0 to ``steps``: 0, then evenly on a logarithmic scale from a fortieth of the way.

    Fewer where two would fall together.
    """
    if checkpoints < 2:
        raise ParameterError(f"{checkpoints} checkpoints", "a series has a first and a last", "ask for 2 or more")
    first, ratio = max(1.0, steps * FIRST_SHARE), max(checkpoints - 2, 1)
    later = [round(first * (steps / first) ** (i / ratio)) for i in range(checkpoints - 1)]
    return tuple(sorted({0, *later[:-1], steps}))


def train(
    name: str,
    *,
    checkpoints: int = 24,
    seed: int | None = None,
    steps: int | None = None,
    cache: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Series:
    """Trains a specimen by its recipe and keeps checkpoints; goes on where an earlier call was stopped.

    Args:
        name: one of ``making.plans.trainable()``; "micro" takes less than a minute of one core.
        checkpoints: how many, the first before the first step.
        seed: other weights and another order of the text than the recipe's own.
        steps: fewer steps than the recipe's, its schedule drawn together.
        cache: where series are kept; ``cache_folder()`` by default.
        device: "cpu" or "cuda".
        progress: called after every step with (steps done, all steps, loss in nats).

    Raises:
        LoadError: no recipe of this name, or the cache cannot be written.
        ParameterError: the cache holds a series of this name that was planned otherwise.
    """
    from .making.plans import plan

    made = plan(name, seed)
    made = made.shortened(steps) if steps else made
    planned = spaced(made.steps, checkpoints)
    folder = _prepare(name, (cache or cache_folder()) / "series" / name, {"seed": seed, "planned": list(planned)})
    _run(made, planned, folder, device, progress)
    return find(name, cache)


def find(name: str, cache: Path | None = None) -> Series:
    """The series of a specimen as far as it has come.

    Raises:
        LoadError: none was started.
    """
    folder = (cache or cache_folder()) / "series" / name
    if not (folder / _SERIES).is_file():
        raise LoadError(f"series '{name}'", f"none is kept in {folder}", f"cutaway specimen train {name}")
    planned = tuple(json.loads((folder / _SERIES).read_text(encoding="utf-8"))["planned"])
    return Series(name, folder, tuple(s for s in planned if _checkpoint(folder, s).is_dir()), planned)


def revision_path(name: str, revision: str, cache: Path | None = None) -> Path:
    """The folder of a checkpoint, ``revision`` as in "step-400".

    Raises:
        LoadError: no such series, or no such checkpoint in it; the nearest ones are given.
    """
    series = find(name, cache)
    known = [r.split("@")[1] for r in series.revisions]
    if revision not in known:
        unfinished = "" if series.is_complete else f"; 'cutaway specimen train {name}' goes on with the series"
        hint = nearest(revision, known) or f"there are {', '.join(known)}"
        raise LoadError(f"revision '{name}@{revision}'", "the series has no such checkpoint", hint + unfinished)
    return series.folder / revision


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / f"step-{step}"


def _prepare(name: str, folder: Path, wanted: dict[str, Any]) -> Path:
    """Makes the folder of a series, or checks that the one there was planned alike."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _SERIES).exists():
            _write(folder / _SERIES, lambda path: path.write_text(json.dumps(wanted), encoding="utf-8"))
    except OSError as error:
        raise LoadError(
            f"cache folder '{folder}'", f"it cannot be written ({error.strerror})", f"set {CACHE_VARIABLE} to another"
        ) from error
    kept = json.loads((folder / _SERIES).read_text(encoding="utf-8"))
    if kept != wanted:
        raise ParameterError(
            f"series '{name}' with seed {wanted['seed']} and {len(wanted['planned'])} checkpoints "
            f"in {wanted['planned'][-1]} steps",
            f"{folder} holds one with seed {kept['seed']} and {len(kept['planned'])} in {kept['planned'][-1]}",
            f"remove that folder, or set {CACHE_VARIABLE} to another",
        )
    return folder


def _run(made: Plan, planned: tuple[int, ...], folder: Path, device: str, progress: Progress | None) -> None:
    from .making import loop

    model = made.model.to(device)
    done, state = _resume(model, folder)
    if done == 0 and not _checkpoint(folder, 0).is_dir():
        _save(made, 0, None, folder)
    before = 0
    for batches, schedule in made.stages:
        start = min(max(done - before, 0), schedule.steps)
        optimizer = loop.optimizer_for(model, schedule)
        if start and start < schedule.steps and state:
            optimizer.load_state_dict(state)
        for step, loss in loop.train(model, batches, schedule, start=start, optimizer=optimizer):
            if before + step in planned:
                _save(made, before + step, optimizer, folder)
            if progress:
                progress(before + step, made.steps, loss)
        before += schedule.steps


def _resume(model: Any, folder: Path) -> tuple[int, dict[str, Any] | None]:
    """Loads the newest complete state into the model; (steps done, optimizer state)."""
    import torch
    from safetensors.torch import load_file

    if not (folder / _RESUME).is_file():
        return 0, None
    kept = torch.load(folder / _RESUME, weights_only=True)
    model.load_state_dict(load_file(_checkpoint(folder, kept["step"]) / "model.safetensors"), strict=False)
    return kept["step"], kept["optimizer"]


def _save(made: Plan, step: int, optimizer: Any, folder: Path) -> None:
    """Writes a checkpoint, then what is needed to go on from it; each appears whole or not at all."""
    import torch
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        unfinished = folder / f".step-{step}.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        made.model.save_pretrained(unfinished)
        made.tokenizer.save_pretrained(unfinished)
    finally:
        if was_shown:
            logging.enable_progress_bar()
    shutil.rmtree(_checkpoint(folder, step), ignore_errors=True)
    unfinished.rename(_checkpoint(folder, step))
    if optimizer is not None:
        state = {"step": step, "optimizer": optimizer.state_dict()}
        _write(folder / _RESUME, lambda path: torch.save(state, path))


def _write(target: Path, write: Callable[[Path], object]) -> None:
    part = target.with_name(f".{target.name}.part")
    write(part)
    part.replace(target)
