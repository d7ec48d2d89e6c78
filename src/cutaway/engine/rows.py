"""Which positions a change can reach, and what a layer call takes per position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class CannotReplayError(Exception):
    """Why a sweep has to take the plain path; the text is a reason, not a sentence for the user."""


@dataclass(frozen=True)
class Reach:
    """How far changes travel along the prompt, given what each position can see.

    Attributes:
        first: first[p] is the earliest position that a change at p can reach in any number of layers.
        last: last[p] is the latest position that position p depends on.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]

    @staticmethod
    def of(length: int, visible: Iterable[Tensor | None]) -> Reach:
        """The reach from each layer's [query, key] visibility; None sees everything.

        A causal prompt reaches from p on. An image block that sees itself in both directions is reached from its start.
        """
        sees = torch.eye(length, dtype=torch.bool)
        for mask in visible:
            sees |= torch.ones_like(sees) if mask is None else mask
        index = torch.arange(length)
        first = torch.where(sees, index[:, None], length).amin(dim=0).tolist()
        last = torch.where(sees, index[None, :], -1).amax(dim=1).tolist()
        # What is reached is a whole tail (a whole head) of the prompt: its own earliest (latest) reach counts too.
        for p in range(length):
            low, high = first[p], last[p]
            while (wider := min(first[low:])) < low:
                low = wider
            while (wider := max(last[: high + 1])) > high:
                high = wider
            first[p], last[p] = low, high
        return Reach(tuple(first), tuple(last))


def position_axis(shape: torch.Size, length: int, name: str) -> int | None:
    """The axis of a tensor that counts positions, None when it has none.

    It is the axis of ``length`` after one of size 1 (the batch), or else the first axis. CannotReplayError when
    neither, or several, have that length.
    """
    if length not in shape:
        return None
    found = [i for i in range(1, len(shape)) if shape[i] == length and shape[i - 1] == 1]
    found = found or ([0] if shape[0] == length else [])
    if len(found) != 1:
        raise CannotReplayError(f"the layer argument {name!r} of shape {list(shape)} is not understood per position")
    return found[0]


def take_rows(value: Any, positions: Tensor, length: int, name: str = "") -> Any:
    """``value`` of a layer call with every tensor that counts positions read at ``positions``.

    Masks over queries and keys stay: the attention that reads them is answered by us. CannotReplayError for objects
    that are not understood, key-value caches among them.
    """
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        if value.ndim >= 3 and value.shape[-2:] == (length, length) and "mask" in name:
            return value
        if "alibi" in name:
            raise CannotReplayError(f"the layer argument {name!r} counts keys")
        axis = position_axis(value.shape, length, name)
        return value if axis is None else value.index_select(axis, positions)
    if isinstance(value, tuple | list):
        return type(value)([take_rows(v, positions, length, name) for v in value])
    if isinstance(value, Mapping) and type(value) is dict:
        return {k: take_rows(v, positions, length, f"{name}.{k}" if name else str(k)) for k, v in value.items()}
    raise CannotReplayError(f"the layer argument {name!r} is a {type(value).__name__}")
