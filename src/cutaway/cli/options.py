"""Options that several commands have, each written once, and the groups of them that commands take whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

if TYPE_CHECKING:
    from cutaway.models.handle import Model

MODEL, OUTPUT = "Model", "Output"
T = TypeVar("T")


def _of_model(flag: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(flag, help=help, metavar=metavar, rich_help_panel=MODEL, show_default=False)


def _of_output(flag: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(flag, help=help, metavar=metavar, rich_help_panel=OUTPUT, show_default=False)


ModelRef = Annotated[str, typer.Argument(metavar="MODEL", help="A specimen, a folder, or a hub id (ref@revision).")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where a result was saved.")]
Dtype = Annotated[str | None, _of_model("--dtype", "float32, bfloat16, ...; as stored when left out.", "DTYPE")]
Device = Annotated[str | None, _of_model("--device", "cpu, cuda, cuda:1, ...", "DEVICE")]
Revision = Annotated[str | None, _of_model("--revision", "Branch, tag or commit of a hub id.", "REVISION")]
TrustPickle = Annotated[bool, _of_model("--trust-pickle", "Open a pickle checkpoint, which may run any code.")]
Out = Annotated[
    list[Path] | None,
    _of_output(
        "--out", "A .html, .png, .svg, .json or .csv file; a name without a dot is a folder. Repeatable.", "PATH"
    ),
]
Overwrite = Annotated[bool, _of_output("--overwrite", "Replace a result in the folder of --out.")]
Json = Annotated[bool, _of_output("--json", "Print JSON instead of a summary.")]


@dataclass(frozen=True)
class Loading:
    """How a model is loaded."""

    dtype: Dtype = None
    device: Device = None
    revision: Revision = None
    trust_pickle: TrustPickle = False

    def model(self, ref: str) -> Model:
        """The model of that name, so loaded."""
        from cutaway.models.load import load

        return load(ref, **vars(self))


@dataclass(frozen=True)
class Delivery:
    """Where a result goes beside standard output, and in which form it is printed."""

    out: Out = None
    overwrite: Overwrite = False
    json: Json = False

    @property
    def places(self) -> list[Path]:
        """Files and folders to write."""
        return self.out or []


def options_of(group: type[Loading] | type[Delivery]) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of every option of a group, by name."""
    hints = get_type_hints(group, include_extras=True)
    return {each.name: (hints[each.name], each.default) for each in fields(group)}


def picked(group: type[T], given: Mapping[str, Any]) -> T:
    """A group out of what a command was given."""
    return group(**{each.name: given[each.name] for each in fields(group)})  # type: ignore[arg-type]


SHARED = {**options_of(Loading), **options_of(Delivery)}
"""Annotation and default of what every method command has beside the method's own parameters."""


def signed(call: Callable[..., None], options: Mapping[str, tuple[Any, Any]]) -> Callable[..., None]:
    """``call``, which takes any keywords, with the signature that Typer reads; ``options`` as in ``SHARED``."""
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d, annotation=a) for n, (a, d) in options.items()]
    )
    call.__annotations__ = {name: annotation for name, (annotation, _) in options.items()}
    return call


def spelled_out(command: Callable[..., None]) -> Callable[..., None]:
    """A command for Typer, where ``Loading`` and ``Delivery`` in its signature are the options that they hold."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if hint in (Loading, Delivery)}

    @wraps(command)
    def call(**given: Any) -> None:
        whole = {name: picked(group, given) for name, group in groups.items()}
        own = {name: given[name] for name in hints if name in given and name not in groups}
        command(**own, **whole)

    options: dict[str, tuple[Any, Any]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        group = groups.get(name)
        options |= options_of(group) if group else {name: (hints[name], parameter.default)}
    return signed(call, options)
