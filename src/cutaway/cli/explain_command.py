"""``cutaway explain``: the model and the prompt may be left out, and a proof that fails is told in the exit code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from cutaway.cli.method_command import run, typed, with_options
from cutaway.cli.options import OUTPUT
from cutaway.cli.output import warn
from cutaway.core.errors import InputError, nearest
from cutaway.core.method import Method

FIRST = "town"  # the specimen that is explained when no model is named
UNPROVED = 3
MODEL = Annotated[
    str, typer.Argument(metavar="[MODEL]", help="A specimen, a folder, or a hub id (ref@revision).", show_default=FIRST)
]
STRICT = Annotated[
    bool,
    typer.Option(
        "--strict",
        help=f"Leave with code {UNPROVED} when a proof fails.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]


def function_of(record: Method) -> Callable[..., None]:
    """The function for Typer."""

    def call(**given: Any) -> None:
        params = typed(record, given)
        if "prompt" not in params:
            params = {**_example(given["model"], given["image"] is not None), **params}
        told: Any = run(record, given["model"], params, given)
        if not told.proved:
            failed = [name.replace("_", " ") for name in told.unproved] or ["the whole" if told.proofs else "any part"]
            warn(f"not proved: {', '.join(failed)}; taking away what they name does no more than random ones")
            if given["strict"]:
                raise typer.Exit(UNPROVED)

    return with_options(call, record, {"model": (MODEL, FIRST)}, ("prompt",), {"strict": (STRICT, False)})


def _example(model: str, has_image: bool) -> dict[str, str]:
    """The first example of a specimen's card; InputError when the model is none."""
    from cutaway import specimens

    asked = f"explaining {model!r}"
    if model not in specimens.names():
        hint = nearest(model, specimens.names())
        raise InputError(asked, "no prompt is given", f"write --prompt 'TEXT'{f', or {hint}' if hint else ''}")
    if has_image:
        raise InputError(asked, "an image is given and no prompt", "write --prompt '<image> QUESTION'")
    return specimens.example(model)
