"""Forms: how a parameter is written as text, and what a method receives for it.

Every parameter of every method has one form. The command line, the saved result and Python go through it alike: a
``str`` is always a text form. ``parse`` and ``text`` are inverse: ``parse(text(v)) == v`` for every ``v`` that
``accept`` gives, objects made in memory apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from cutaway.core.proof import Proof

if TYPE_CHECKING:
    import torch

IN_MEMORY = "<in memory: "
"""How the text of a value begins that no text can hold (an image without a file, logits to compare with)."""


class ModelLike(Protocol):
    """What parameters and provenance ask of a model."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def devices(self) -> tuple[torch.device, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def n_layers(self) -> int: ...

    def token(self, text: str | int, /) -> int:
        """The id of one token."""
        ...


class Form:
    """How one type of parameter is written.

    Methods raise ``ValueError`` with what was found; whoever knows the parameter's name makes it a ``ParameterError``.

    Attributes:
        name: one word for tables and ``--help``.
        says: how it is written, with an example.
        many: the command line may give it several times.
        from_file: the command line may name a file that holds it, as ``@FILE``.
    """

    name: str = "text"
    says: str = ""
    many: bool = False
    from_file: bool = False

    def parse(self, text: str) -> Any:
        """The value that ``text`` stands for, before any model is known."""
        raise TypeError(f"{type(self).__name__} defines no parse(text)")

    def text(self, value: Any) -> str:
        """The text of a value that ``accept`` gave."""
        return str(value)

    def accept(self, given: Any) -> Any:
        """The value of what a caller gave: a text form, or a Python value that this form knows."""
        if isinstance(given, str):
            return self.parse(refuse_in_memory(given))
        raise ValueError(f"it is {described(given)}")

    def value(self, value: Any, model: ModelLike) -> Any:
        """What the method receives: names resolved on ``model``."""
        return value

    def content(self, value: Any) -> bytes | None:
        """What the model will read because of this parameter, as bytes to hash; None for a setting."""
        return None


def in_memory(what: str) -> str:
    """The text of a value that no text can hold."""
    return f"{IN_MEMORY}{what}>"


def refuse_in_memory(text: str) -> str:
    """``text`` itself; ValueError when it stands for something that was never saved."""
    if text.startswith(IN_MEMORY):
        raise ValueError("it was made in memory and not saved, so it cannot be made again from text")
    return text


class Plain(Form):
    """A number, a switch, a word or one of some words: checked by pydantic against its annotation."""

    def __init__(self, annotation: Any, name: str, says: str) -> None:
        self.annotation, self.name, self.says = annotation, name, says

    @cached_property
    def _validate(self) -> Callable[[Any], Any]:
        from pydantic import TypeAdapter

        return TypeAdapter(self.annotation).validate_python

    def accept(self, given: Any) -> Any:
        from pydantic import ValidationError

        plain = given.item() if hasattr(given, "item") else given  # numbers of numpy and torch
        try:
            found = self._validate(plain)
        except ValidationError as error:
            first = error.errors()[0]["msg"].removeprefix("Input should be ")
            raise ValueError(f"it should be {first}" if "Input" in error.errors()[0]["msg"] else first) from None
        if isinstance(found, float) and math.isnan(found):
            raise ValueError("it should be a number")
        return found

    def parse(self, text: str) -> Any:
        return self.accept(text)

    def text(self, value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return repr(value) if isinstance(value, float) else str(value)

    def schema(self) -> dict[str, Any]:
        """JSON schema of the value."""
        from pydantic import TypeAdapter

        return TypeAdapter(self.annotation).json_schema()


class DrawsForm(Plain):
    """How many random draws a proof compares with: enough of them, or none."""

    def __init__(self) -> None:
        super().__init__(int, "whole number", f"a whole number (at least {Proof.MIN_DRAWS}; 0 leaves the proof out)")

    def accept(self, given: Any) -> Any:
        n = super().accept(given)
        if n < 0 or 0 < n < Proof.MIN_DRAWS:
            raise ValueError(f"it is {n}; give at least {Proof.MIN_DRAWS}, or 0 for no proof")
        return n


class ListOf(Form):
    """Several of one form: ``a, b, "c, d"``; quotes keep commas and outer spaces."""

    many = True

    def __init__(self, item: Form) -> None:
        self.item = item
        self.name = f"{item.name}s"
        self.says = f'several, separated by commas ("quotes" keep commas and outer spaces), each {item.says}'

    def parse(self, text: str) -> tuple[Any, ...]:
        return tuple(self.item.parse(refuse_in_memory(part)) for part in split_list(text))

    def text(self, value: tuple[Any, ...]) -> str:
        return join_list(self.item.text(each) for each in value)

    def accept(self, given: Any) -> tuple[Any, ...]:
        if isinstance(given, str):
            return self.parse(given)
        if hasattr(given, "tolist"):
            given = given.tolist()
        if not isinstance(given, Iterable):
            given = [given]
        return tuple(self.item.accept(each) for each in given)

    def value(self, value: tuple[Any, ...], model: ModelLike) -> list[Any]:
        return [self.item.value(each, model) for each in value]

    def content(self, value: tuple[Any, ...]) -> bytes | None:
        parts = [part for each in value if (part := self.item.content(each)) is not None]
        return b"\0".join(parts) if parts else None


_ITEM = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|(?!\s*")([^,]*?))\s*(,|$)', re.DOTALL)


def split_list(text: str) -> list[str]:
    """The items of ``a, "b, b", c``. ValueError when a quote is left open or an item is empty."""
    items: list[str] = []
    at, more = 0, bool(text.strip())
    while more:
        match = _ITEM.match(text, at)
        if match is None or not (match[1] is not None or match[2]):
            raise ValueError(f"{text!r} does not read as a list at {text[at:]!r}")
        items.append(match[2] if match[1] is None else re.sub(r"\\(.)", r"\1", match[1], flags=re.DOTALL))
        at, more = match.end(), match[3] == ","
    return items


def join_list(items: Iterable[str]) -> str:
    """The text that ``split_list`` reads back: items with commas, quotes or outer spaces are put in quotes."""
    return ", ".join(
        item if item and item == item.strip() and not set(item) & set(',"') else quoted(item) for item in items
    )


def quoted(item: str) -> str:
    """The item in quotes, with what would end them escaped."""
    escaped = re.sub(r'(["\\])', r"\\\1", item)
    return f'"{escaped}"'


def as_ids(given: Any) -> tuple[int, ...] | None:
    """Token ids of a list or tensor of whole numbers, [pos] or one row [1, pos]; None when it is not one."""
    plain = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(plain, list | tuple) and len(plain) == 1 and isinstance(plain[0], list | tuple):
        plain = plain[0]
    if not isinstance(plain, list | tuple) or not plain:
        return None
    return tuple(plain) if all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in plain) else None


def described(given: Any) -> str:
    """The type of a value, with its shape or, for a list, its content."""
    name = type(given).__name__
    content = f" {given!r}" if isinstance(given, list | tuple) else ""
    shape = f" of shape {list(given.shape)}" if hasattr(given, "shape") else content
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}{shape}"
