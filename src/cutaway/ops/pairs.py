"""Clean prompts, what stands for what is taken away in them, and the number that is measured in each.

What is taken away becomes what it is in a corrupt prompt that lines up with the clean one, or its mean over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cutaway.core.errors import MismatchError, ParameterError, UnsupportedError
from cutaway.core.inputs import Inputs, require_difference, require_same_length
from cutaway.core.metric import Metric
from cutaway.ops.watched import WatchedModel

OWN = {"logit_diff": "logit of the answer less its rival's", "logprob": "log p(answer)", "prob": "p(answer)"}
"""What metrics are called that differ in their tokens alone."""


@dataclass(frozen=True)
class Measure:
    """One number per row: a metric, or the log-probability of each row's own answer, or its logit less its rival's.

    Attributes:
        metric: the same for all rows; None for tokens per row.
        answers, rivals: [row] token ids; no rivals for log-probabilities.
    """

    metric: Metric | None = None
    answers: tuple[int, ...] = ()
    rivals: tuple[int, ...] = ()

    @property
    def unit(self) -> str:
        """Unit of the number."""
        return self.metric.unit if self.metric is not None else "logits" if self.rivals else "nats"

    def __str__(self) -> str:
        if self.metric is not None:
            return str(self.metric)
        return OWN["logit_diff" if self.rivals else "logprob"]

    def prepare(self, inputs: Inputs) -> Inputs:
        """The inputs to run."""
        return inputs if self.metric is None else self.metric.prepare(inputs)

    def reads(self, inputs: Inputs) -> Tensor:
        """[row, read] padded positions whose logits are needed."""
        return torch.tensor([[p] for p in inputs.last] if self.metric is None else self.metric.reads(inputs))

    def take(self, rows: Sequence[int]) -> Measure:
        """The measure of some rows."""
        if self.metric is None:
            return Measure(
                None, *(tuple(each[b] for b in rows) if each else () for each in (self.answers, self.rivals))
            )
        reference = self.metric.reference
        return self if reference is None else Measure(replace(self.metric, reference=reference[list(rows)]))

    def of(self, logits: Tensor) -> Tensor:
        """[row] of the logits [row, read, vocab] at ``reads``."""
        if self.metric is not None:
            return self.metric.of(logits)
        wide = logits[:, 0].float()
        named = [wide.gather(1, torch.tensor(ids, device=wide.device)[:, None])[:, 0] for ids in self._named]
        return named[0] - (named[1] if len(named) > 1 else wide.logsumexp(-1))

    @property
    def _named(self) -> list[tuple[int, ...]]:
        return [ids for ids in (self.answers, self.rivals) if ids]

    def against(self, logits: Tensor) -> Measure:
        """This measure; ``kl`` without a reference compares with ``logits`` [row, read, vocab]."""
        if self.metric is None or self.metric.form != "kl" or self.metric.reference is not None:
            return self
        return Measure(self.metric.against(logits))


@dataclass(frozen=True)
class Pairs:
    """Clean prompts, their corrupt ones, and what is measured.

    Attributes:
        corrupt: lines up with ``clean`` position by position; None when a mean stands for what is taken away.
    """

    clean: Inputs
    corrupt: Inputs | None
    measure: Measure

    @staticmethod
    def of(
        clean: Inputs,
        corrupt: Inputs | None,
        metric: Metric | None,
        answers: Sequence[int] | None = None,
        rivals: Sequence[int] | None = None,
    ) -> Pairs:
        """The pairs of equal rows of two batches.

        Raises:
            MismatchError: prompts of unequal length or a pair of one prompt twice, naming the tokens; unequal numbers.
            ParameterError: neither or both of a metric and answers.
        """
        if corrupt is not None:
            require_pairs(len(clean), len(corrupt))
            require_same_length(clean, corrupt)
            if clean.ids.shape != corrupt.ids.shape or not torch.equal(clean.mask, corrupt.mask):
                raise MismatchError("pairs of prompts", "clean and corrupt ones are padded differently", "give texts")
            require_difference(clean, corrupt)
        require_measure(len(clean), metric, answers, rivals)
        measure = Measure(metric, tuple(answers or ()), tuple(rivals or ()))
        return Pairs(measure.prepare(clean), None if corrupt is None else measure.prepare(corrupt), measure)

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def has_images(self) -> bool:
        """Whether the prompts come with pixels, so that rows cannot be repeated."""
        return bool(self.clean.extra) and self.clean.has_images

    def take(self, rows: Sequence[int]) -> Pairs:
        """Some pairs; a pair may be taken several times."""
        corrupt = None if self.corrupt is None else self.corrupt.take(rows)
        return Pairs(self.clean.take(rows), corrupt, self.measure.take(rows))


def require_pairs(clean: int, corrupt: int) -> None:
    """MismatchError when there are not as many corrupt prompts as clean ones."""
    if clean != corrupt:
        found = f"{clean} clean and {corrupt} corrupt prompts"
        raise MismatchError("pairs of prompts", found, "give one corrupt prompt for each clean one")


def require_measure(
    prompts: int,
    metric: Metric | None,
    answers: Sequence[int] | None,
    rivals: Sequence[int] | None,
    optional: bool = False,
) -> None:
    """Refuses anything but a metric for all prompts, or a token for each; neither of them is fine where ``optional``.

    Raises:
        ParameterError: neither or both, or rivals without answers. MismatchError: unequal numbers.
    """
    neither = metric is None and answers is None
    asked = "parameters 'metric' and 'answers' (with 'rivals')"
    if neither and not (optional and rivals is None):
        raise ParameterError(asked, "neither is given", "give one of the two")
    if metric is not None and (answers is not None or rivals is not None):
        raise ParameterError(asked, "they are given together", "give one of the two")
    for name, tokens in (("answers", answers), ("rivals", rivals)):
        if tokens is not None and len(tokens) != prompts:
            raise MismatchError(name, f"{len(tokens)} tokens for {prompts} prompts", "give one token per prompt")


def paired(
    model: Any,
    clean: Any,
    corrupt: Any,
    metric: Metric | None,
    answers: Sequence[int] | None,
    rivals: Sequence[int] | None,
    images: tuple[Any, Any] = (None, None),
) -> Pairs:
    """The pairs of prompts as a method's caller wrote them; the corrupt image is the clean one when it is not given."""
    side = "left" if metric is not None and metric.form == "answer" else "right"
    first = model.inputs(clean, images[0], padding_side=side)
    other = images[0] if images[1] is None else images[1]
    second = None if corrupt is None else model.inputs(corrupt, other, padding_side=side)
    return Pairs.of(first, second, metric, answers, rivals)


def read_logits(model: WatchedModel, states: Tensor, reads: Tensor) -> Tensor:
    """[row, read, vocab] logits of the last residual stream [row, pos, d] at the positions read; bears gradients."""
    return through_tail(model, at_reads(states, reads))[1]


def at_reads(states: Tensor, reads: Tensor) -> Tensor:
    """[..., row, read, d] of [..., row, pos, d] at the positions read [row, read]."""
    row = torch.arange(states.shape[-3], device=states.device)[:, None]
    return states[..., row, reads.to(states.device), :]


def through_tail(model: WatchedModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """([1, n, d] what the first step, as a rule the final norm, gives; the logits) of n last residual states [..., d].

    Raises:
        UnsupportedError: the way from there to the logits could not be told.
    """
    why = model.anatomy().refused.get("readout")
    if why or not model.anatomy().tail:
        raise UnsupportedError(f"the logits of {model.name}", why or "the way to them is not known")
    y = x.reshape(1, -1, x.shape[-1]).to(model.dtype)
    first: Tensor | None = None
    for step in model.anatomy().tail:
        y = step.run(model.hf, y)
        first = y if first is None else first
    return y if first is None else first, y.reshape(*x.shape[:-1], -1)
