"""Options that several commands have, and the model that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cutaway.models.handle import Model

MODEL, OUTPUT = "Model", "Output"


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

SHARED: dict[str, tuple[Any, Any]] = {
    "dtype": (Dtype, None),
    "device": (Device, None),
    "revision": (Revision, None),
    "trust_pickle": (TrustPickle, False),
    "out": (Out, None),
    "overwrite": (Overwrite, False),
    "json": (Json, False),
}
"""Annotation and default of what every method command has beside the method's own parameters."""


def load_model(ref: str, dtype: str | None, device: str | None, revision: str | None, trust_pickle: bool) -> Model:
    """The model of these options."""
    from cutaway.models.load import load

    return load(ref, dtype=dtype, device=device, revision=revision, trust_pickle=trust_pickle)
