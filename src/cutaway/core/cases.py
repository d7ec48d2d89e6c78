"""Cases: prompts with what is asked of each, from a file or a list. What a method is run over many times."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cutaway.core.errors import InputError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prompt, and what goes with it; "" and None stand for nothing.

    Attributes:
        prompt: the text, or ids as '#12 #7'. target, versus: tokens. image: a file, or the image itself.
        type: what the case is one of, for numbers by type.
        answer: the text that should follow; its token is the target where it is one token and no target is given.
    """

    prompt: str
    target: str = ""
    versus: str = ""
    image: Any = None
    type: str = ""
    answer: str = ""

    @staticmethod
    def of(given: Any, asked: str) -> Case:
        """The case of a text or of a mapping; InputError when it is none."""
        if isinstance(given, Case):
            return given
        if isinstance(given, str):
            return Case(prompt=given)
        if not isinstance(given, Mapping):
            raise InputError(asked, f"it is {given!r}", 'write a text, or {"prompt": "...", "target": "..."}')
        for name in given:
            if name not in NAMES:
                raise InputError(asked, f"it has {name!r}", nearest(str(name), NAMES) or f"use {', '.join(NAMES)}")
        if not isinstance(given.get("prompt"), str):
            raise InputError(asked, "it has no prompt", "name one: 'prompt'")
        return Case(
            **{name: value for name, value in given.items() if value not in (None, "")} | {"prompt": given["prompt"]}
        )

    def as_json(self) -> dict[str, Any]:
        """What was given, by name."""
        return {name: value for name in NAMES if (value := getattr(self, name)) not in (None, "")}


NAMES = tuple(each.name for each in fields(Case))


def cases_of(given: Iterable[Any], asked: str) -> tuple[Case, ...]:
    """The cases of a list; InputError when there is none, or one cannot be read."""
    found = tuple(Case.of(each, f"{asked}, case {i + 1}") for i, each in enumerate(given))
    if not found:
        raise InputError(asked, "there is no prompt", "give at least one")
    return found


def read_cases(path: Path) -> tuple[Case, ...]:
    """The cases of a file: JSON lines (.jsonl), a table with a column ``prompt`` (.csv), or a prompt per line.

    Images are named from the file's own folder.

    Raises:
        InputError: it cannot be read, is empty, or a line is no case.
    """
    asked = f"prompts of {str(path)!r}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(asked, f"the file cannot be read ({reason})", "give a text file") from None
    found = cases_of(_records(path.suffix, text, asked), asked)
    return tuple(_placed(case, path.parent) for case in found)


def _records(suffix: str, text: str, asked: str) -> Iterator[Any]:
    if suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text))
        if "prompt" not in (rows.fieldnames or ()):
            raise InputError(
                asked, f"its columns are {', '.join(rows.fieldnames or ()) or 'none'}", "name one 'prompt'"
            )
        yield from rows
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if suffix not in (".jsonl", ".json"):
            yield line
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{asked}, line {number}", f"it is not JSON ({error})", "write one object per line"
            ) from None


def _placed(case: Case, folder: Path) -> Case:
    return replace(case, image=str(folder / case.image)) if isinstance(case.image, str) else case
