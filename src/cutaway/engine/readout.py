"""From the last residual stream to a metric, computing no logit that the metric does not read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cutaway.core.metric import Metric
from cutaway.models.handle import Model
from cutaway.models.plan import Step

COPIES, WIDE = 4, 4
"""Tensors over the vocabulary alive at once while a metric is computed, and bytes of their float32 numbers."""


class Readout:
    """The metric of rows of the last residual stream.

    A metric that reads the logits of a few tokens multiplies with their rows of the head only. Others take the whole
    vocabulary, a few runs at a time.
    """

    def __init__(self, model: Model, metric: Metric, positions: int, budget: int) -> None:
        self.model, self.metric = model, metric
        tail = model.anatomy().tail
        self._head = next((i for i in reversed(range(len(tail))) if tail[i].module), -1)
        self._tail = tail
        width = len(metric.ids) if self.few else self.vocabulary
        self._bytes_per_run = COPIES * positions * width * WIDE
        self._runs = max(1, budget // self._bytes_per_run)

    @property
    def vocabulary(self) -> int:
        """Tokens that the head scores."""
        head: Any = self.model.hf.get_output_embeddings()  # type: ignore[operator]
        weight = getattr(head, "weight", None)  # Blip names no head, Musicgen several
        return self.model.encoder.vocabulary_size if weight is None else int(weight.shape[0])

    @property
    def few(self) -> bool:
        """Whether only the rows of the metric's tokens are computed."""
        if not self.metric.tokens_only or self._head < 0:
            return False
        head = self.model.hf.get_submodule(self._tail[self._head].module)
        return type(head) is nn.Linear and all(_elementwise(step) for step in self._tail[self._head + 1 :])

    def bytes(self, runs: int) -> int:
        """Bytes that scoring so many runs at once takes, within the budget."""
        return min(runs, self._runs) * self._bytes_per_run

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Tensor:
        """[run] the metric of [run, read, d_model] rows of the last residual stream."""
        return torch.cat([self.score(part) for part in rows.split(self._runs)])

    def score(self, rows: Tensor) -> Tensor:
        """[run] the metric of rows, at once, and with their graph where they have one."""
        if not self.few:
            return self.metric.of(self.logits(rows))
        named = replace(self.metric, ids=tuple(range(len(self.metric.ids))))
        return named.of(self.logits(rows, self.metric.ids))

    def score_each(self, rows: Tensor, metrics: Sequence[Metric]) -> Tensor:
        """[run] each row by a metric of its own; they differ in their tokens or in what they compare with."""
        ids = list(dict.fromkeys(i for metric in metrics for i in metric.ids)) if self.few else None
        logits = self.logits(rows, ids)
        if ids is not None:
            metrics = [replace(metric, ids=tuple(map(ids.index, metric.ids))) for metric in metrics]
        return each_of(logits, metrics)

    def logits(self, rows: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        """[run, read, vocab] logits of rows, or those of ``ids`` alone (where ``few``)."""
        hf, x = self.model.hf, rows.to(self.model.device, self.model.dtype).reshape(1, -1, rows.shape[-1])
        for i, step in enumerate(self._tail):
            x = self._named(x, ids) if ids is not None and i == self._head else step.run(hf, x)
        return x.reshape(*rows.shape[:-1], -1)

    def _named(self, x: Tensor, ids: Sequence[int]) -> Tensor:
        head = self.model.hf.get_submodule(self._tail[self._head].module)
        at = torch.tensor(ids, device=x.device)
        bias = None if head.bias is None else head.bias[at]  # type: ignore[index]
        return nn.functional.linear(x, head.weight[at], bias)  # type: ignore[index]


def each_of(logits: Tensor, metrics: Sequence[Metric]) -> Tensor:
    """[run] each row of logits [run, read, vocab] by its own metric."""
    return torch.cat([metric.of(row[None]) for row, metric in zip(logits, metrics, strict=True)])


def _elementwise(step: Step) -> bool:
    if step.call is None:
        return False
    _, args, kwargs = step.call
    others = [a for i, a in enumerate(args) if i != step.slot] + list(kwargs.values())
    return all(isinstance(a, int | float | torch.dtype | None) for a in others)
