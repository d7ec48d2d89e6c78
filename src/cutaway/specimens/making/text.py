"""Examples as rows of tokens, and how much of them a model gets right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cutaway.data import Example

from .loop import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Sentence:
    """Token ids of a sentence and how many of them are its prompt."""

    ids: list[int]
    prompt: int


def encode(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], stop: str = ".") -> list[Sentence]:
    """Each example's prompt, answer and ``stop`` as tokens, without the start token."""
    whole = tokenizer([e.prompt + e.answer + stop for e in examples], add_special_tokens=False)["input_ids"]
    prompts = tokenizer([e.prompt for e in examples], add_special_tokens=False)["input_ids"]
    return [Sentence(ids, len(prompt)) for ids, prompt in zip(whole, prompts, strict=True)]


class Mixture:
    """Rows of packed sentences: skills by their shares, examples of a skill by their weights.

    Args:
        skills: skill -> its examples.
        shares: skill -> its share of the sentences.
        tokenizer: its ``bos`` token starts every row.
        rows, length: shape of a batch.
        seed: with the step, decides the batch.
        prompt_weight: weight of the tokens of a prompt in the loss; those of an answer have 1.
    """

    def __init__(
        self,
        skills: Mapping[str, Sequence[Example]],
        shares: Mapping[str, float],
        tokenizer: PreTrainedTokenizerFast,
        *,
        rows: int,
        length: int,
        seed: int,
        prompt_weight: float,
    ) -> None:
        self.skills = [encode(tokenizer, skills[name]) for name in shares]
        self.shares = np.array(list(shares.values())) / sum(shares.values())
        self.weights = []
        for name in shares:
            weights = np.array([e.weight for e in skills[name]])
            self.weights.append(np.cumsum(weights / weights.sum()))
        self.bos = tokenizer.bos_token_id
        self.rows, self.length, self.seed, self.prompt_weight = rows, length, seed, prompt_weight

    def __call__(self, step: int) -> Batch:
        """The batch of step ``step``."""
        random = np.random.default_rng([self.seed, step])
        ids = np.full((self.rows, self.length), self.bos, dtype=np.int64)
        weights = np.zeros((self.rows, self.length), dtype=np.float32)
        for row in range(self.rows):
            at = 1
            while at < self.length:
                skill = random.choice(len(self.shares), p=self.shares)
                drawn = np.searchsorted(self.weights[skill], random.random())
                sentence = self.skills[skill][drawn]
                room = min(len(sentence.ids), self.length - at)
                ids[row, at : at + room] = sentence.ids[:room]
                weights[row, at : at + room] = 1.0
                weights[row, at : at + min(sentence.prompt, room)] = self.prompt_weight
                at += room
        return Batch({"input_ids": torch.from_numpy(ids)}, torch.from_numpy(weights))


Row = tuple[np.ndarray, np.ndarray]  # ids and weights of one row
SHORTEST, LONGEST = 5, 20  # tokens of a text that repeats itself


def repeat(random: np.random.Generator, ids: np.ndarray, start: int, length: int) -> Row:
    """A row of ``length`` tokens in which a short random text repeats itself; the first copy weighs nothing."""
    size = int(random.integers(SHORTEST, LONGEST + 1))
    period = random.choice(ids, size)
    row = np.concatenate([[start], np.tile(period, length // size + 1)])[:length]
    return row, (np.arange(length) > size).astype(np.float32)


def stack(rows: Sequence[Row]) -> Batch:
    """Rows filled at their right to the longest; what is filled in weighs nothing."""
    length = max(len(row) for row, _ in rows)
    ids, weights = np.zeros((len(rows), length), dtype=np.int64), np.zeros((len(rows), length), dtype=np.float32)
    for i, (row, weight) in enumerate(rows):
        ids[i, : len(row)], weights[i, : len(row)] = row, weight
    return Batch({"input_ids": torch.from_numpy(ids)}, torch.from_numpy(weights))


@torch.no_grad()
def correct(
    model: Any, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], *, stop: str = ".", batch: int = 256
) -> list[bool]:
    """Whether the greedy continuation of each prompt is its answer and ``stop``, one per example."""
    device = next(model.parameters()).device
    sentences = encode(tokenizer, examples, stop)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, sentence in enumerate(sentences):
        groups.setdefault((len(sentence.ids), sentence.prompt), []).append(i)
    right = [False] * len(sentences)
    for (_, prompt), members in groups.items():
        for start in range(0, len(members), batch):
            chosen = members[start : start + batch]
            ids = torch.tensor([[tokenizer.bos_token_id, *sentences[i].ids] for i in chosen], device=device)
            predicted = model(input_ids=ids[:, :-1]).logits[:, prompt:].argmax(-1)
            for i, ok in zip(chosen, (predicted == ids[:, prompt + 1 :]).all(-1).tolist(), strict=True):
                right[i] = ok
    return right


def accuracy(model: Any, tokenizer: PreTrainedTokenizerFast, examples: Iterable[Example], *, stop: str = ".") -> float:
    """Share of the examples whose greedy continuation is right; NaN for none."""
    marks = correct(model, tokenizer, list(examples), stop=stop)
    return sum(marks) / len(marks) if marks else float("nan")
