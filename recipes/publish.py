"""Runs a recipe with its loss on the screen, and writes a specimen's folder: model, tokenizer or processor, card."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

from cutaway.specimens import registry
from cutaway.specimens.making import loop

LICENCE = "Apache-2.0 (weights and data; the data is generated)"


def run(name: str, model: torch.nn.Module, stages: Sequence[tuple[loop.Batches, loop.Schedule]]) -> dict[str, Any]:
    """Trains in place, stage after stage, on a GPU when there is one, and returns the card's ``training`` field."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    began, log, done = time.perf_counter(), [], 0
    with tqdm(total=sum(schedule.steps for _, schedule in stages), desc=name) as bar:
        for batches, schedule in stages:
            for step, loss in loop.train(model, batches, schedule):
                log.append((done + step, loss))
                bar.update()
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            done += schedule.steps
    model.to("cpu")
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    return {
        "steps": done,
        "seconds": round(time.perf_counter() - began),
        "machine": f"{machine}, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
        "loss": loop.curve(log),
    }


def publish(name: str, model: Any, processor: Any, *, folder: Path | None = None, **card: Any) -> registry.Card:
    """Saves ``model`` and ``processor`` (tokenizer or processor) under ``name`` and returns the card, also written.

    Args:
        folder: where specimens live; the package's own folder by default.
        card: the fields of ``Card`` that the model does not tell.
    """
    logging.disable_progress_bar()
    target = (folder or registry.HERE) / name
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target)
    processor.save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)
    weights = sorted(target.glob("*.safetensors"))
    for file in weights:
        file.chmod(0o644)  # the library saves them for their owner alone
    written = registry.Card(
        name=name,
        architecture=type(model).__name__,
        parameters=loop.parameters(model),
        licence=LICENCE,
        size=sum(file.stat().st_size for file in weights),
        sha256={file.name: registry.digest(file) for file in weights},
        **card,
    )
    written.save(target)
    print(f"{name}: {written.size / 1e6:.2f} MB")
    for figure, value in written.accuracies.items():
        print(f"  {figure:40s} {value:.3f}")
    return written
