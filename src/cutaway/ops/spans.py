"""Where words stand in a prompt."""

from __future__ import annotations

from cutaway.core.errors import InputError
from cutaway.core.inputs import Inputs


def find(inputs: Inputs, words: str, what: str) -> list[int]:
    """Which of the real tokens of one row hold ``words``, where they first stand; spaces do not count.

    Raises:
        InputError: the words are not there, or begin or end within a token; the sentence names the tokens.
    """
    tokens = [inputs.tokens[0][p] for p in inputs.real[0]]
    text, starts = "", []
    for token in tokens:
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
    found = f"it is not one or several whole tokens of the prompt, which are {tokens}"
    raise InputError(f"{what} {words!r}", found, "write it as it stands there")
