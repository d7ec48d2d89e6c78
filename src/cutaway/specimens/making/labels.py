"""How *labels* is trained: induction first, then in-context classification with words that mean nothing."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cutaway.data import Example, Labels
from cutaway.data.labels import Shot

from . import loop, shapes, text, tokenizers

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# With the library's initial weights, or with both tasks from the start, matching heads do not form.
INDUCTION = loop.Schedule(steps=1000, rate=4e-3, warmup=50, floor=0.5, decay=0.01)
LABELLING = loop.Schedule(steps=1200, rate=3e-3, warmup=50, decay=0.05)
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
ROWS, LENGTH, SHOTS, SEED = 32, 64, 14, 0
NAMED, REPEATED = 1 / 3, 0.15  # shares of rows labelled with the category's name, and of rows that repeat


def tokenizer_for(world: Labels) -> PreTrainedTokenizerFast:
    """One token per word, label and sign."""
    return tokenizers.word_level(world.vocabulary())


def untrained(tokenizer: PreTrainedTokenizerFast, seed: int = SEED) -> LlamaForCausalLM:
    """The model before its first step."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(shapes.llama(tokenizer, SHAPE))
    loop.initialise(model, seed, weights=0.05, embeddings=0.7, outputs=0.35)
    return model


def repeats(tokenizer: PreTrainedTokenizerFast, world: Labels, seed: int = SEED) -> loop.Batches:
    """The first stage: rows in which a short random text repeats itself."""
    ids = np.array(tokenizer.convert_tokens_to_ids(world.vocabulary()))

    def batch(step: int) -> loop.Batch:
        random = np.random.default_rng([seed, 0, step])
        return text.stack([text.repeat(random, ids, tokenizer.bos_token_id, LENGTH) for _ in range(ROWS)])

    return batch


def lessons(tokenizer: PreTrainedTokenizerFast, world: Labels, seed: int = SEED) -> loop.Batches:
    """The second stage: rows of labelled words, a third of them by the category's name, and some rows that repeat."""
    ids = np.array(tokenizer.convert_tokens_to_ids(world.vocabulary()))
    number = {w: int(i) for w, i in zip(world.vocabulary(), ids, strict=True)}

    def row(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        if random.random() < REPEATED:
            return text.repeat(random, ids, tokenizer.bos_token_id, LENGTH)
        shots = world.shots(Random(int(random.integers(2**62))), SHOTS, named=random.random() < NAMED)
        return _lesson(shots, number, tokenizer.bos_token_id)

    def batch(step: int) -> loop.Batch:
        random = np.random.default_rng([seed, 1, step])
        return text.stack([row(random) for _ in range(ROWS)])

    return batch


def _lesson(shots: list[Shot], number: dict[str, int], start: int) -> tuple[np.ndarray, np.ndarray]:
    row, weights = np.full(LENGTH, number[";"]), np.zeros(LENGTH, dtype=np.float32)
    row[0] = start
    seen: set[str] = set()
    for i, shot in enumerate(shots):
        row[1 + 3 * i : 3 + 3 * i] = number[shot.word], number[shot.label]
        known = shot.label in seen or shot.label == shot.category
        weights[2 + 3 * i] = 1.0 if known else 0.0
        seen.add(shot.label)
    return row[: 1 + 3 * len(shots)], weights[: 1 + 3 * len(shots)]


def exam(world: Labels, count: int = 300) -> dict[str, list[Example]]:
    """What the model is asked, by the name of the figure on its card."""
    return {
        f"labels {shots} shots{' held-out' if split == 'held-out' else ''}": world.examples(
            count, shots=shots, words=split, labels=split, seed=1
        )
        for shots in (4, 8, 12)
        for split in ("train", "held-out")
    }


def accuracies(model: Any, tokenizer: PreTrainedTokenizerFast, world: Labels) -> dict[str, float]:
    """Every figure of the card, recomputed; held-out is held-out words with held-out labels."""
    figures = {name: text.accuracy(model, tokenizer, found, stop="") for name, found in exam(world).items()}
    return figures | {"induction": induction(model, tokenizer, world)}


@torch.no_grad()
def induction(model: Any, tokenizer: PreTrainedTokenizerFast, world: Labels) -> float:
    """Share of the tokens predicted right in the second and later copies of new random texts."""
    batch = repeats(tokenizer, world, seed=SEED + 1)(0)
    ids = batch.inputs["input_ids"].to(next(model.parameters()).device)
    right = model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    return float(right[batch.weights[:, 1:].to(ids.device) > 0].float().mean())
