"""Several pairs of prompts, one exchange each: they run one after the other, and what is made for them may be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

from torch import Tensor

from cutaway.core.inputs import Inputs, require_difference, require_same_length
from cutaway.core.metric import Metric
from cutaway.core.site import Site
from cutaway.engine.patching import Direction, Exchange
from cutaway.models.handle import Model
from cutaway.ops.pairs import OWN, require_measure, require_pairs

T = TypeVar("T")


def exchanges(
    model: Model,
    clean: Any,
    corrupt: Any,
    metric: Metric | None,
    answers: Sequence[int] | None,
    rivals: Sequence[int] | None,
    direction: Direction,
    images: tuple[Any, Any] = (None, None),
) -> list[Exchange]:
    """One exchange per pair of prompts; images go with every pair. See ``Exchange.of`` and ``metrics_of``.

    Raises:
        MismatchError: unequal numbers of prompts or tokens, or a pair of unequal length or of one prompt twice, with
            its row and its tokens.
        ParameterError: a metric and answers together, or a pair whose prompts have one answer when neither is given.
    """
    first = rows_of(model, clean, images[0])
    second = rows_of(model, corrupt, images[0] if images[1] is None else images[1])
    require_pairs(len(first), len(second))
    for row, (one, other) in enumerate(zip(first, second, strict=True)):
        require_same_length(one, other, row)
        require_difference(one, other, row)
    metrics = metrics_of(model, len(first), metric, answers, rivals)
    several = len(first) > 1
    return [
        Exchange.of(model, one, other, own, direction, number=number if several else None)
        for number, (one, other, own) in enumerate(zip(first, second, metrics, strict=True))
    ]


def rows_of(model: Model, prompts: Any, image: Any = None) -> list[Inputs]:
    """One row of inputs, without padding, for each of several prompts; the image goes with each."""
    if isinstance(prompts, Inputs):
        return [prompts.row(b) for b in range(len(prompts))] if prompts.padded or len(prompts) > 1 else [prompts]
    return [model.inputs(prompt, image) for prompt in prompts]


def metrics_of(
    model: Model,
    n: int,
    metric: Metric | None,
    answers: Sequence[int] | None,
    rivals: Sequence[int] | None,
) -> list[Metric | None]:
    """The metric of each of ``n`` prompts: the one given, or that of its own answer and rival; None for neither."""
    require_measure(n, metric, answers, rivals, optional=True)
    if answers is not None:
        named = list(zip(answers, *([] if rivals is None else [rivals]), strict=True))
        form = "logprob" if rivals is None else "logit_diff"
        return [Metric(form, ids, words=tuple(map(model.decode, ids))) for ids in named]
    if metric is not None and metric.reference is not None and len(metric.reference) == n:
        return [replace(metric, reference=row[None]) for row in metric.reference]
    return [metric] * n


def called(metrics: Iterable[Metric]) -> str:
    """How to call what several prompts are measured by."""
    each = list(metrics)
    names = dict.fromkeys(map(str, each))
    return next(iter(names)) if len(names) == 1 else OWN.get(each[0].form, each[0].form)


class Kept(Generic[T]):
    """What ``make`` gives for each pair, by its number: kept while ``budget`` bytes last, else made again when asked.

    ``size`` tells the bytes of one. The first is always kept.
    """

    def __init__(self, make: Callable[[int], T], size: Callable[[T], int], budget: int) -> None:
        self._make, self._size, self._room = make, size, budget
        self._held: dict[int, T] = {}

    def __getitem__(self, number: int) -> T:
        if number in self._held:
            return self._held[number]
        made = self._make(number)
        self.put(number, made)
        return made

    def put(self, number: int, made: T) -> None:
        """Keep what was made elsewhere, if there is room."""
        size = self._size(made)
        if not self._held or size <= self._room:
            self._held[number] = made
            self._room -= size


def size_of(values: Mapping[Site, Tensor]) -> int:
    """Bytes that activations take."""
    return sum(t.numel() * t.element_size() for t in values.values())
