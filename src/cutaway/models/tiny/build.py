"""Builds tiny models: class name -> configuration -> weights -> inputs -> one forward that must be finite."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from cutaway.core.errors import UnsupportedError, nearest
from cutaway.models.tiny.inputs import image_inputs, text_inputs
from cutaway.models.tiny.overrides import CANNOT
from cutaway.models.tiny.shrink import tiny_config
from cutaway.models.tiny.weights import redraw, seeded

CAUSAL_LM, IMAGE_TEXT = TASKS = ("causal-lm", "image-text-to-text")


@dataclass(frozen=True)
class TinyModel:
    """A model in eval mode (float32, CPU) and keyword arguments for one call of it."""

    hf: nn.Module
    inputs: dict[str, torch.Tensor]
    class_name: str
    task: str


@cache
def architectures() -> list[tuple[str, str]]:
    """(class name, task) of every causal-LM and image-text-to-text class of the installed transformers, sorted."""
    from transformers.models.auto import modeling_auto

    named = {
        CAUSAL_LM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        IMAGE_TEXT: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    return sorted({(name, task) for task, mapping in named.items() for name in mapping.values()})


def tiny(class_name: str, task: str | None = None, *, seed: int = 0, **config_overrides: Any) -> TinyModel:
    """A tiny model of a transformers class, drawn from ``seed``, with inputs for it.

    Args:
        class_name: a class of ``architectures()``, such as "LlamaForCausalLM".
        task: "causal-lm" or "image-text-to-text"; where a class serves both, causal-lm unless said.
        seed: of weights, token ids and pixels.
        config_overrides: attributes of the configuration; ``text_config__vocab_size=99`` reaches a sub-configuration.

    Raises:
        UnsupportedError: no such class, or it cannot be built or run here; the sentence says why.
    """
    import transformers

    known = architectures()
    tasks = [t for name, t in known if name == class_name]
    if not tasks:
        raise UnsupportedError(
            f"a tiny {class_name!r}",
            f"not among the {len(known)} causal-LM and image-text-to-text classes of transformers",
            nearest(class_name, sorted({name for name, _ in known})),
        )
    if task is not None and task not in tasks:
        raise UnsupportedError(f"a tiny {class_name!r} for {task!r}", f"it serves {' and '.join(tasks)}", "")
    task = task or tasks[0]
    if class_name in CANNOT:
        raise UnsupportedError(f"a tiny {class_name!r} for {task}", CANNOT[class_name], "")
    cls = getattr(transformers, class_name)
    try:
        model = build(cls, seed, config_overrides)
        inputs = text_inputs(seed) if task == CAUSAL_LM else image_inputs(model, seed)
        with torch.no_grad():
            logits = model(**inputs).logits
    except UnsupportedError:
        raise
    except Exception as error:  # whatever transformers raises is the reason, and is passed on
        raise UnsupportedError(f"a tiny {class_name!r} for {task}", _sentence(error), "") from error
    if not torch.isfinite(logits).all():
        raise UnsupportedError(f"a tiny {class_name!r} for {task}", "its logits are not finite", "")
    return TinyModel(hf=model, inputs=inputs, class_name=class_name, task=task)


def build(cls: Any, seed: int, changes: dict[str, Any]) -> nn.Module:
    """The module alone, in eval mode, with weights drawn from ``seed``."""
    config = tiny_config(cls.config_class, changes)
    with seeded(seed):
        model = cls._from_config(config, dtype=torch.float32)
    redraw(model, seed)
    return model.eval()


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        text = text.partition(" but ")[0]  # what is needed, without how to install it
    return f"{type(error).__name__}: {text}"
