"""The commands. Method commands come from the catalog; none is named here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from cutaway import catalog
from cutaway.cli import explain_command
from cutaway.cli.graphs import choose_circuit, convert
from cutaway.cli.method_command import function_of, help_of, safe
from cutaway.cli.options import Delivery, Folder, Json, Loading, ModelRef, spelled_out
from cutaway.cli.output import (
    check_targets,
    deliver,
    deliver_records,
    deliver_rows,
    remark,
    show_json,
    show_lines,
    show_rows,
)

DESCRIPTION = """Look inside language and vision-language models: see, locate, prove, change, verify, follow.

A MODEL is a specimen that comes with Cutaway ('cutaway specimens'), a folder, or a hub id."""
DIFFERENT = 1
EXPLAIN = "explain"
FIRST = "Begin here"


def app(words: Sequence[str] = ()) -> typer.Typer:
    """The command line. Only the method that ``words`` name is imported; of the others the listing is enough."""
    made = typer.Typer(
        name="cutaway", help=DESCRIPTION, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
    )
    made.callback()(everywhere)
    wanted = next((word for word in words if not word.startswith("-")), "")
    for name, head in catalog.composed().items():
        if name == wanted:
            record = catalog.get(name)
            of = explain_command.function_of if name == EXPLAIN else function_of
            made.command(name, help=help_of(record), rich_help_panel=FIRST)(of(record))
        else:
            made.command(name, help=safe(head.summary), rich_help_panel=FIRST)(_listed)
    for name, head in catalog.headlines().items():
        panel = f"Methods: {head.stage}"
        if name == wanted:
            record = catalog.get(name)
            made.command(name, help=help_of(record), rich_help_panel=panel)(function_of(record))
        else:
            made.command(name, help=safe(head.summary), rich_help_panel=panel)(_listed)
    for panel, commands in FIXED.items():
        for name, function in commands.items():
            made.command(name, rich_help_panel=panel)(spelled_out(function))
    specimen = typer.Typer(name="specimen", help="One of the models that come with Cutaway.", rich_markup_mode="rich")
    specimen.callback()(_listed)
    specimen.command("show")(specimen_show)
    specimen.command("train")(specimen_train)
    made.add_typer(specimen, rich_help_panel="Models")
    return made


def everywhere(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Read by ``main`` before the words are parsed, so that it may stand anywhere; here for the help."""


def _listed() -> None:
    """A command that is listed and not run."""


def sites(
    model: ModelRef,
    loading: Loading = Loading(),
    delivery: Delivery = Delivery(),
) -> None:
    """Every site of a model: shape with named axes, equation, foreign names."""
    check_targets(delivery)
    from cutaway.models.sites import site_table

    deliver_rows(site_table(loading.model(model)), delivery)


def doctor(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="What to verify.")] = None,
    architectures: Annotated[bool, typer.Option("--architectures", help="Verify every class of transformers.")] = False,
    loading: Loading = Loading(),
    delivery: Delivery = Delivery(),
) -> None:
    """Verify that what is read from a model is what it computes (exit code 1 when not)."""
    if architectures == (model is not None):
        raise typer.BadParameter("give a MODEL, or --architectures for all classes")
    check_targets(delivery)
    if model is None:
        from cutaway.models.support import survey

        deliver_records([support.as_json() for support in survey()], "architectures", delivery)
        return
    from cutaway.models.doctor import doctor as examined

    report = examined(loading.model(model))
    deliver_rows(report, delivery)
    if "NO" in report.columns["holds"]:
        raise typer.Exit(DIFFERENT)


def rerun(
    folder: Folder,
    model: Annotated[str | None, typer.Option("--model", help="The model, where the result cannot name it.")] = None,
    rtol: Annotated[float, typer.Option(help="Largest relative difference that counts as equal.")] = 1e-5,
    atol: Annotated[float, typer.Option(help="Largest absolute difference that counts as equal.")] = 1e-6,
    loading: Loading = Loading(),
    json: Json = False,
) -> None:
    """Make a saved result again and say whether it is equal (exit code 1 when not)."""
    given = loading.model(model) if model else None
    again = catalog.rerun(folder, given, rtol, atol)
    if json:
        show_json({"equal": again.equal, "differences": again.difference.lines, "notes": again.notes})
    else:
        notes = [f"note: {note}" for note in again.notes]
        show_lines("equal" if again.equal else "different", *again.difference.lines, *notes)
    if not again.equal:
        raise typer.Exit(DIFFERENT)


def open_saved(folder: Folder, delivery: Delivery = Delivery()) -> None:
    """Print a saved result, or write it in another form."""
    from cutaway.results import open_result

    check_targets(delivery)
    deliver(open_result(folder), delivery)


def list_methods(json: Json = False) -> None:
    """The methods, by stage."""
    rows = [{"method": h.name, "stage": h.stage, "summary": h.summary} for h in catalog.headlines().values()]
    show_rows(rows, json)
    if not json:
        remark(f"made of methods: {', '.join(catalog.composed())}; on saved results: {', '.join(FIXED['Results'])}")


def list_specimens(json: Json = False) -> None:
    """The models that come with Cutaway."""
    from cutaway.specimens.show import listing

    show_rows(listing(), json)


def specimen_show(name: Annotated[str, typer.Argument(metavar="NAME")], json: Json = False) -> None:
    """The card of a specimen: what it can do, how it was made, what is known about its insides."""
    from cutaway import specimens
    from cutaway.specimens.show import described

    if json:
        show_json(specimens.card(name))
    else:
        show_lines(*described(name).splitlines())


def specimen_train(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    checkpoints: Annotated[int, typer.Option(min=2, help="How many checkpoints to keep, log-spaced.")] = 24,
    seed: Annotated[int | None, typer.Option(help="Another draw of weights and of the order of the text.")] = None,
    json: Json = False,
) -> None:
    """Train a specimen by its recipe and keep checkpoints; goes on where an earlier run was stopped."""
    from cutaway.specimens.show import train

    made = train(name, checkpoints=checkpoints, seed=seed)
    if json:
        show_json({"folder": str(made.folder), "revisions": made.revisions, "complete": made.is_complete})
    else:
        show_lines(*made.revisions)


def version(json: Json = False) -> None:
    """Versions of Cutaway and of what decides its numbers."""
    from cutaway.core.versions import versions

    found = versions()
    if json:
        show_json(found)
    else:
        show_rows([{"name": name, "version": number} for name, number in found.items()], False)


FIXED: dict[str, dict[str, Callable[..., None]]] = {
    "Models": {"sites": sites, "doctor": doctor, "specimens": list_specimens},
    "Results": {"open": open_saved, "rerun": rerun, "circuit": choose_circuit, "convert": convert},
    "About": {"methods": list_methods, "version": version},
}
"""Commands that are no methods, by the panel they are listed in."""
