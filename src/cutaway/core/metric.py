"""Metrics: one number per row from the logits, with a unit and a text form.

Text forms (a token is its string, in quotes when it holds a comma or outer spaces, or ``#id``)::

    logit: TOK     logit_diff: A, B     logprob: TOK     prob: TOK     loss: TOK     rank: TOK     accuracy: TOK
    entropy        kl                   answer: A, B, C  (log-probability of several tokens, teacher-forced)

``@p`` behind any form reads position p of each row instead of the last: ``"logprob: Paris @3"``.
All are differentiable but ``rank`` and ``accuracy``. ``kl`` compares with reference logits: ``metric.against(logits)``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cutaway.core.errors import ParameterError, nearest
from cutaway.core.forms.base import join_list, quoted, split_list
from cutaway.core.inputs import Inputs
from cutaway.core.site import Items


class Vocabulary(Protocol):
    """What turns the text of a token into its id."""

    def token(self, text: str | int) -> int:
        """The id of one token; TokenError when the text is none or several."""
        ...


class _Form(NamedTuple):
    n_tokens: int | None
    unit: str
    whole_vocabulary: bool
    compute: Callable[[Tensor, Sequence[int], Tensor | None], Tensor]


def _logprob(logits: Tensor, ids: Sequence[int], _: Tensor | None = None) -> Tensor:
    return logits[:, 0, ids[0]] - logits[:, 0].logsumexp(dim=-1)


def _rank(logits: Tensor, ids: Sequence[int], _: Tensor | None = None) -> Tensor:
    return (logits[:, 0] > logits[:, 0, ids[0] : ids[0] + 1]).sum(dim=-1).to(logits.dtype)


def _entropy(logits: Tensor, ids: Sequence[int], _: Tensor | None) -> Tensor:
    logp = logits[:, 0].log_softmax(dim=-1)
    return -(logp.exp() * logp).sum(dim=-1)


def _kl(logits: Tensor, ids: Sequence[int], reference: Tensor | None) -> Tensor:
    if reference is None:
        raise ParameterError(
            "metric 'kl'", "it has nothing to compare with", "give reference logits: metric.against(logits)"
        )
    p, q = reference.to(logits)[:, 0].log_softmax(dim=-1), logits[:, 0].log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)


def _answer(logits: Tensor, ids: Sequence[int], _: Tensor | None) -> Tensor:
    chosen = torch.tensor(ids, device=logits.device).expand(logits.shape[0], -1)[..., None]
    return logits.log_softmax(dim=-1).gather(-1, chosen).sum(dim=(1, 2))


FORMS: dict[str, _Form] = {
    "logit": _Form(1, "logits", False, lambda x, i, _: x[:, 0, i[0]]),
    "logit_diff": _Form(2, "logits", False, lambda x, i, _: x[:, 0, i[0]] - x[:, 0, i[1]]),
    "logprob": _Form(1, "nats", True, _logprob),
    "prob": _Form(1, "probability", True, lambda x, i, _: _logprob(x, i).exp()),
    "loss": _Form(1, "nats", True, lambda x, i, _: -_logprob(x, i)),
    "rank": _Form(1, "rank (0 = first)", True, _rank),
    "accuracy": _Form(1, "fraction", True, lambda x, i, _: (_rank(x, i) == 0).to(x.dtype)),
    "entropy": _Form(0, "nats", True, _entropy),
    "kl": _Form(0, "nats", True, _kl),
    "answer": _Form(None, "nats", True, _answer),
}


@dataclass(frozen=True, eq=False)
class Metric:
    """One number per row of a batch.

    Attributes:
        form: a key of ``FORMS``.
        ids: the token ids it names. Empty for entropy and kl.
        position: the position read in each row; None is the last real token.
        words: how the tokens were written, for the text form.
        reference: [rows, vocab] logits that kl compares with.
    """

    form: str
    ids: tuple[int, ...] = ()
    position: int | None = None
    words: tuple[str, ...] = ()
    reference: Tensor | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ParameterError(
                f"metric {self.form!r}",
                "there is none of that name",
                nearest(self.form, FORMS) or f"metrics: {', '.join(FORMS)}",
            )
        need = FORMS[self.form].n_tokens
        if len(self.ids) != need if need is not None else not self.ids:
            raise ParameterError(
                f"metric {self.form!r}",
                f"it takes {need or 'some'} tokens and got {len(self.ids)}",
                "write 'logit_diff: A, B'",
            )

    @staticmethod
    def parse(text: str, vocabulary: Vocabulary) -> Metric:
        """The metric of a text form; ParameterError or TokenError when it is none."""
        match = re.fullmatch(r"\s*(\w+)\s*(?::\s*(.*?))?\s*(?:@\s*(-?\d+))?\s*", text, re.DOTALL)
        if not match:
            raise ParameterError(
                f"metric {text!r}", "it does not read as one", "write for example 'logit_diff: #11, #22'"
            )
        try:
            words = tuple(split_list(match[2] or ""))
        except ValueError as error:
            raise ParameterError(f"metric {text!r}", str(error), "write for example 'logit_diff: #11, #22'") from None
        ids = tuple(vocabulary.token(word) for word in words)
        return Metric(match[1], ids, None if match[3] is None else int(match[3]), words)

    @property
    def unit(self) -> str:
        """Unit of the number."""
        return FORMS[self.form].unit

    @property
    def tokens_only(self) -> bool:
        """Whether the logits of ``ids`` are all it reads."""
        return not FORMS[self.form].whole_vocabulary

    def against(self, reference: Tensor) -> Metric:
        """This metric compared with ``reference`` [rows, 1, vocab] logits of the read position."""
        return replace(self, reference=reference.detach())

    def prepare(self, inputs: Inputs) -> Inputs:
        """The inputs to run: for ``answer`` all its tokens but the last are appended, else ``inputs`` themselves."""
        return inputs.extend(self.ids[:-1]) if self.form == "answer" and len(self.ids) > 1 else inputs

    def reads(self, inputs: Inputs) -> list[list[int]]:
        """Padded positions that are read in each row of the prepared inputs."""
        if self.form == "answer":
            return [row[-len(self.ids) :] for row in inputs.real]
        if self.position is None:
            return [[p] for p in inputs.last]
        return inputs.select(Items.of(self.position), f"metric '{self}'")

    def of(self, logits: Tensor) -> Tensor:
        """[rows] the metric of [rows, read, vocab] logits of the read positions."""
        precise = logits if logits.dtype == torch.float64 else logits.float()
        return FORMS[self.form].compute(precise, self.ids, self.reference)

    def __call__(self, logits: Tensor, inputs: Inputs) -> Tensor:
        """[batch] the metric of [batch, pos, vocab] logits of the prepared inputs."""
        at = torch.tensor(self.reads(inputs), device=logits.device)
        return self.of(logits[torch.arange(len(inputs), device=logits.device)[:, None], at])

    def __str__(self) -> str:
        words = self.words or tuple(f"#{i}" for i in self.ids)
        listed = ", ".join(quoted(w) if "@" in w else join_list([w]) for w in words)
        place = f" @{self.position}" if self.position is not None else ""
        return self.form + (f": {listed}" if listed else "") + place
