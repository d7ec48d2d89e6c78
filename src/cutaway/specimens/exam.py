"""The figures of a card, computed again from the weights that are shipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import registry

Figures = dict[str, float]


def evaluate(name: str) -> Figures:
    """Every accuracy of a specimen's card, measured anew on the CPU: figure -> value in [0, 1].

    Raises:
        LoadError, WeightsError: as ``path``.
    """
    folder, card = registry.path(name), registry.card(name)
    model, processor = load_plain(folder, card.task)
    exam = _exams().get(name)
    return exam(model, processor) if exam else {"answers": answers(model, processor, card.examples)}


def load_plain(folder: Path, task: str) -> tuple[Any, Any]:
    """Model (fp32, eval mode) and tokenizer or processor of a folder, through transformers alone."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    if task == "image-text-to-text":
        return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def answers(model: Any, tokenizer: Any, examples: Sequence[dict[str, Any]]) -> float:
    """Share of the prompts that are greedily continued with their answer."""
    right = 0
    for example in examples:
        prompt = tokenizer(example["prompt"], return_tensors="pt").input_ids
        answer = tokenizer(example["answer"], add_special_tokens=False, return_tensors="pt").input_ids
        logits = model(input_ids=torch.cat([prompt, answer], dim=1)).logits
        right += bool((logits[:, prompt.shape[1] - 1 : -1].argmax(-1) == answer).all())
    return right / len(examples)


def _exams() -> dict[str, Callable[[Any, Any], Figures]]:
    from cutaway.data import Labels, Town

    from .making import labels, recall, scenes, town, tuned

    return {
        "town": lambda model, tokenizer: town.accuracies(model, tokenizer, Town()),
        "town-tuned": lambda model, tokenizer: tuned.accuracies(model, tokenizer, Town()),
        "labels": lambda model, tokenizer: labels.accuracies(model, tokenizer, Labels()),
        "scenes": lambda model, processor: scenes.accuracies(model, processor.tokenizer),
        "scenes-base": scenes.base_accuracies,
        "recall-1": recall.accuracies,
        "recall-2": recall.accuracies,
    }
