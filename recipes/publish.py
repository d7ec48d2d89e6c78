"""Writes a specimen's folder: model, tokenizer or processor, and its card with the digests of the weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers.utils import logging

from cutaway.specimens import registry
from cutaway.specimens.making import loop

LICENCE = "Apache-2.0 (weights and data; the data is generated)"


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
    return written
