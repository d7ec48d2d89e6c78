"""The command of a method: its options are its parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from cutaway.cli.options import SHARED, Delivery, Loading, ModelRef, picked, signed
from cutaway.cli.output import check_targets, deliver
from cutaway.core.errors import InputError, MethodError
from cutaway.core.forms.base import Form
from cutaway.core.method import Method, Parameter
from cutaway.core.result import Result

PARAMETERS = "Parameters"


def function_of(record: Method) -> Callable[..., None]:
    """A function for Typer: the model, the method's parameters, and what every command has.

    Raises:
        MethodError: a parameter of the method has the name of an option that every command has.
    """
    clash = sorted(record.parameters.keys() & (SHARED.keys() | {"model", "help", "traceback"}))
    if clash:
        raise MethodError(
            f"method {record.name!r}", f"every command has an option {clash[0]!r}", "rename its parameter"
        )

    def call(**given: Any) -> None:
        run(record, given["model"], typed(record, given), given)

    return with_options(call, record, {"model": (ModelRef, inspect.Parameter.empty)})


def with_options(
    call: Callable[..., None],
    record: Method,
    first: Mapping[str, tuple[Any, Any]],
    optional: Collection[str] = (),
    more: Mapping[str, tuple[Any, Any]] | None = None,
) -> Callable[..., None]:
    """``call``, which takes any keywords, with the signature of a command.

    Args:
        first: annotation and default of what comes before the method's parameters, by name.
        optional: parameters of the method that may be left out here. more: options beside those that all have.
    """
    asked = dict(first)
    for name, parameter in record.parameters.items():
        here = replace(parameter, required=parameter.required and name not in optional)
        asked[name] = option_of(here), _default_of(here)
    return signed(call, {**asked, **SHARED, **(more or {})})


def typed(record: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """The method's parameters as they were typed; those that were not are left out."""
    return {
        name: text_of(parameter.form, given[name])
        for name, parameter in record.parameters.items()
        if given[name] is not None and given[name] != []
    }


def run(record: Method, model: str, params: dict[str, Any], given: Mapping[str, Any]) -> Result:
    """The method's result, delivered; ``given`` holds what every command has."""
    delivery = picked(Delivery, given)
    record.bind((), params)
    check_targets(delivery, record.kind)
    result = record.run(picked(Loading, given).model(model), **params)
    deliver(result, delivery)
    return result


def option_of(parameter: Parameter) -> Any:
    """The annotation that makes Typer's option of a parameter. Every value is taken as text; the form reads it."""
    form, switch = parameter.form, parameter.form.name == "switch"
    written = "" if switch else f"({form.says}{'; @FILE reads a file' if form.from_file else ''})"
    says = " ".join(part for part in (parameter.help, written) if part)
    option = typer.Option(
        _flags(parameter),
        help=safe(says),
        metavar=None if switch else _metavar(form),
        show_default=parameter.default is not None,
        rich_help_panel=PARAMETERS,
    )
    kind: Any = bool if switch else list[str] if form.many else str
    return Annotated[kind if parameter.required else kind | None, option]


def _default_of(parameter: Parameter) -> Any:
    if parameter.required:
        return inspect.Parameter.empty
    if parameter.default is None or isinstance(parameter.default, bool):
        return parameter.default
    return [parameter.default_text] if parameter.form.many else parameter.default_text


def flag_of(parameter: Parameter) -> str:
    """How the option of a parameter is written: ``--layers LAYERS``."""
    switch = parameter.form.name == "switch"
    return _flags(parameter) if switch else f"{_flags(parameter)} {_metavar(parameter.form)}"


def _flags(parameter: Parameter) -> str:
    word = parameter.name.replace("_", "-")
    return f"--{word}/--no-{word}" if parameter.form.name == "switch" else f"--{word}"


def _metavar(form: Form) -> str:
    return form.name.upper().replace(" ", "_")


def text_of(form: Form, given: Any) -> Any:
    """What was typed, as the parameter takes it: ``@FILE`` read, one of a repeatable option as its text form."""
    words = given if isinstance(given, list) else [given]
    if form.from_file:
        words = [line for word in words for line in _from_file(word, form.many)]
    return words[0] if len(words) == 1 else words


def _from_file(word: str, lines: bool) -> list[str]:
    if not word.startswith("@"):
        return [word[1:] if re.match(r"\\+@", word) else word]
    try:
        content = Path(word[1:]).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        hint = rf"for a text that begins with @, write '\{word[:12]}'"
        raise InputError(f"the file of {word!r}", f"it cannot be read ({reason})", hint) from None
    found = [line for line in content.splitlines() if line] if lines else [content.removesuffix("\n")]
    if not found:
        raise InputError(f"the file of {word!r}", "it is empty", "give one prompt per line")
    return found


def help_of(record: Method) -> str:
    """The docstring up to its sections, as paragraphs without marks of code, safe for rich."""
    text = re.split(r"^(?:Args|Returns|Raises|Shapes|Source|Example):", record.doc, maxsplit=1, flags=re.MULTILINE)[0]
    paragraphs = [each if "\n " in each else " ".join(each.split("\n")) for each in text.strip().split("\n\n")]
    return safe("\n\n".join(paragraphs))


def safe(text: str) -> str:
    """Text of a docstring without marks of code, safe for rich."""
    return escape(text.replace("``", ""))
