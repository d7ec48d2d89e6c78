"""How *recall-1* and *recall-2* are trained: associative recall, which one layer cannot learn and two layers can."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cutaway.data.recall import KEYS, VALUES, recall

from . import loop, shapes, text, tokenizers

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

REPEATS = loop.Schedule(steps=400, rate=4e-3, warmup=50, floor=0.5, decay=0.01)
QUESTIONS = loop.Schedule(steps=1000, rate=2e-3, warmup=50, decay=0.01)
SHAPE = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
ROWS, LENGTH, PAIRS, SEED = 96, 40, 6, 0


def tokenizer_for() -> PreTrainedTokenizerFast:
    """One token per key and value."""
    return tokenizers.word_level((*KEYS, *VALUES))


def untrained(tokenizer: PreTrainedTokenizerFast, layers: int, seed: int = SEED) -> LlamaForCausalLM:
    """The model of ``layers`` layers before its first step."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(shapes.llama(tokenizer, {"num_hidden_layers": layers, **SHAPE}))
    loop.initialise(model, seed, weights=0.07, embeddings=0.7, outputs=0.35)
    return model


def repeats(tokenizer: PreTrainedTokenizerFast, seed: int = SEED) -> loop.Batches:
    """The first stage: rows in which a short random text repeats itself, the quickest way to a matching head."""
    ids = np.array(tokenizer.convert_tokens_to_ids([*KEYS, *VALUES]))

    def batch(step: int) -> loop.Batch:
        random = np.random.default_rng([seed, 0, step])
        return text.stack([text.repeat(random, ids, tokenizer.bos_token_id, LENGTH) for _ in range(ROWS)])

    return batch


def questions(tokenizer: PreTrainedTokenizerFast, seed: int = SEED) -> loop.Batches:
    """The second stage: rows of ``PAIRS`` pairs of key and value, then one of the keys and its value."""
    keys, values = (np.array(tokenizer.convert_tokens_to_ids(list(words))) for words in (KEYS, VALUES))

    def batch(step: int) -> loop.Batch:
        random = np.random.default_rng([seed, 1, step])
        key = keys[np.argsort(random.random((ROWS, len(keys))))[:, :PAIRS]]
        value = values[np.argsort(random.random((ROWS, len(values))))[:, :PAIRS]]
        shown = np.stack([key, value], axis=2)
        asked = shown[np.arange(ROWS), random.integers(PAIRS, size=ROWS)]
        start = np.full((ROWS, 1), tokenizer.bos_token_id)
        ids = np.concatenate([start, shown.reshape(ROWS, -1), asked], axis=1)
        weights = np.zeros(ids.shape, dtype=np.float32)
        weights[:, -1] = 1.0
        return loop.Batch({"input_ids": torch.from_numpy(ids)}, torch.from_numpy(weights))

    return batch


def accuracies(model: Any, tokenizer: PreTrainedTokenizerFast, count: int = 1000) -> dict[str, float]:
    """Share of ``count`` new prompts answered right, with as many pairs as in training and with fewer."""
    return {
        f"recall {pairs} pairs": text.accuracy(model, tokenizer, recall(count, pairs=pairs), stop="")
        for pairs in (PAIRS, PAIRS // 2)
    }
