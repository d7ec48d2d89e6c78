"""Prompts of labelled examples: where their labels stand, and the same examples in another order or fewer of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cutaway.core.errors import InputError, ParameterError
from cutaway.core.inputs import Inputs
from cutaway.core.site import Items
from cutaway.ops.parts import unpadded
from cutaway.ops.watched import WatchedModel


@dataclass(frozen=True)
class Labelled:
    """One prompt of examples with labels, and a question.

    Attributes:
        inputs: one row without padding.
        places, labels: position and token of every label, in order.
        gold: the right label. rival: of the other labels the one that the model likes most.
        right: whether the model likes the right one best of the labels.
    """

    inputs: Inputs
    places: tuple[int, ...]
    labels: tuple[int, ...]
    gold: int
    rival: int
    right: bool

    @property
    def kinds(self) -> tuple[int, ...]:
        """The different labels, as they come."""
        return tuple(dict.fromkeys(self.labels))

    @property
    def counts(self) -> dict[int, int]:
        """How often each label is shown."""
        return {label: self.labels.count(label) for label in self.kinds}

    def other(self, label: int) -> int:
        """What a label is weighed against: the right one, or the rival of the right one."""
        return self.rival if label == self.gold else self.gold

    @property
    def shots(self) -> list[tuple[int, int]]:
        """Where each example begins and ends: behind its label, and what stands behind every label alike."""
        ids = self.inputs.ids[0].tolist()
        ends = [*self.places[1:], len(ids)]
        behind = [ids[p + 1 : end] for p, end in zip(self.places, ends, strict=True)]
        shared = 0
        while all(len(text) > shared + 1 and text[shared] == behind[0][shared] for text in behind):
            shared += 1
        special = next((i for i, role in enumerate(self.inputs.roles[0]) if role != "special"), 0)
        starts = [min(special, self.places[0]), *(p + 1 + shared for p in self.places)]
        return list(pairwise(starts))

    def arranged(self, order: Sequence[int]) -> list[int]:
        """Ids of the prompt with these of its examples, in this order."""
        ids, shots = self.inputs.ids[0].tolist(), self.shots
        return [*ids[: shots[0][0]], *(i for n in order for i in ids[slice(*shots[n])]), *ids[shots[-1][1] :]]


def labelled(model: WatchedModel, prompts: Inputs, labels: Sequence[int], gold: Sequence[int] | None) -> list[Labelled]:
    """The prompts read; without ``gold`` the model's own choice among the labels of each is the right one.

    Raises:
        InputError: a prompt shows fewer than two of the labels. ParameterError: ``gold`` does not line up.
    """
    if gold is not None and len(gold) != len(prompts):
        raise ParameterError("parameter 'gold'", f"{len(gold)} for {len(prompts)} prompts", "give one for each")
    rows = [prompts.row(b) if len(prompts) > 1 else unpadded(prompts) for b in range(len(prompts))]
    return [_read(model, row, labels, None if gold is None else gold[b], f"prompt {b}") for b, row in enumerate(rows)]


def again(model: WatchedModel, prompt: Labelled, order: Sequence[int]) -> Labelled:
    """The prompt with these of its examples in this order; the right label stays."""
    rows = model.inputs([prompt.arranged(order)])
    return _read(model, rows, prompt.kinds, prompt.gold, "an arrangement", prompt.kinds)


def _read(
    model: WatchedModel, row: Inputs, labels: Sequence[int], gold: int | None, what: str, more: Sequence[int] = ()
) -> Labelled:
    """The labels of a row; the right one is weighed against others that it shows, and against ``more``."""
    ids = row.ids[0].tolist()
    places = tuple(i for i, token in enumerate(ids[:-1]) if token in labels)
    shown = tuple(ids[i] for i in places)
    known = list(dict.fromkeys((*shown, *(() if gold is None else (gold,)), *more)))
    if len(known) < 2:
        found = f"it shows {[model.decode(i) for i in known] or 'none'} of the labels"
        raise InputError(what, found, f"labels asked for: {', '.join(model.decode(i) for i in labels)}")
    logits = last_logits(model, row)
    right = max(known, key=lambda i: float(logits[i])) if gold is None else gold
    rival = max((i for i in known if i != right), key=lambda i: float(logits[i]))
    return Labelled(row, places, shown, right, rival, bool(logits[right] > logits[rival]))


def last_logits(model: WatchedModel, row: Inputs, do: Any = ()) -> Tensor:
    """[vocab] at the last position of one row."""
    last = f"L{model.n_layers - 1}.resid_post@{Items.of(-1)}"
    state = model.trace(row, want=last, do=do, stop=True)[last]
    return model.unembed(state)[0, -1].float().cpu()


def margin(logits: Tensor, prompt: Labelled) -> float:
    """log p of the right label less that of the best other one shown."""
    rest = [i for i in prompt.kinds if i != prompt.gold] or [prompt.rival]
    return float(logits[prompt.gold] - torch.stack([logits[i] for i in rest]).max())
