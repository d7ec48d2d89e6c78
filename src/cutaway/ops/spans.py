"""Where words stand in a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from cutaway.core.errors import InputError
from cutaway.core.inputs import Inputs


def find(inputs: Inputs, words: str | Sequence[int], what: str) -> list[int]:
    """Which of the real tokens of one row hold ``words``, a text or ids, where they first stand; spaces do not count.

    Raises:
        InputError: the words are not there, or begin or end within a token; the sentence names the tokens.
    """
    found = _of_text(inputs, words) if isinstance(words, str) else _of_ids(inputs, words)
    if not found:
        tokens = [inputs.tokens[0][p] for p in inputs.real[0]]
        said = f"it is not one or several whole tokens of the prompt, which are {tokens}"
        raise InputError(f"{what} {named(words)!r}", said, "write it as it stands there")
    return found


def named(words: str | Sequence[int]) -> str:
    """How words are called in a sentence."""
    return words if isinstance(words, str) else " ".join(f"#{i}" for i in words)


def _of_ids(inputs: Inputs, ids: Sequence[int]) -> list[int]:
    there = inputs.ids[0, inputs.real[0]].tolist()
    starts = (i for i in range(len(there) - len(ids) + 1) if there[i : i + len(ids)] == list(ids))
    first = next(starts, None)
    return [] if first is None else list(range(first, first + len(ids)))


def _of_text(inputs: Inputs, words: str) -> list[int]:
    text, starts = "", []
    for token in (inputs.tokens[0][p] for p in inputs.real[0]):
        starts.append(len(text))
        text += "".join(token.split())
    sought = "".join(words.split())
    ends = [*starts[1:], len(text)]
    at = text.find(sought) if sought else -1
    while at >= 0:
        if at in starts and at + len(sought) in ends:
            return [
                i
                for i, (a, b) in enumerate(zip(starts, ends, strict=True))
                if at <= a and b <= at + len(sought) and a < b
            ]
        at = text.find(sought, at + 1)
    return []
