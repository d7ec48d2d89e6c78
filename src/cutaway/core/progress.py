"""Progress of long runs, on standard error, and only where a person watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """``items`` as they are, with a bar while they are taken; nothing is drawn when standard error is not a terminal.

    Args:
        what: what is being done, in one or two words.
        total: how many there are, when ``len(items)`` does not say.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from tqdm.auto import tqdm

    yield from tqdm(items, desc=what, total=total, leave=False, file=sys.stderr)
