"""What a command leaves behind: results on standard output and in files, everything else on standard error."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Columns
from rich.text import Text

from cutaway.core.errors import ResultError
from cutaway.core.result import Result

if TYPE_CHECKING:
    from cutaway.cli.options import Delivery
    from cutaway.results.table import Table


ENDLESS = 1_000_000
"""Columns of what is no terminal: one line per row, however long."""


def complain(sentence: str) -> None:
    """One red line on standard error."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(f"error: {sentence}", style="red"))


def warn(sentence: str) -> None:
    """One yellow line on standard error."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(f"warning: {sentence}", style="yellow"))


def remark(sentence: str) -> None:
    """One line on standard error."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(sentence, style="dim"))


def show(renderable: Any) -> None:
    """A rich renderable on standard output."""
    Console(highlight=False).print(renderable)


def show_lines(*lines: object) -> None:
    """Plain lines on standard output, as long as they are."""
    Console(highlight=False, markup=False, soft_wrap=True).print(*lines, sep="\n")


def show_json(value: Any) -> None:
    """A value as JSON on standard output; numbers that JSON lacks (NaN, infinity) become null."""
    sys.stdout.write(json_text(value) + "\n")


def json_text(value: Any) -> str:
    """A value as strict JSON."""
    return json.dumps(_jsonable(value), allow_nan=False, ensure_ascii=False)


def show_rows(rows: Sequence[Any], as_json: bool) -> None:
    """A table of equal dataclasses, named tuples or mappings, one line per row."""
    records = [_record(row) for row in rows]
    if as_json:
        show_json(records)
        return
    table = Columns(box=None, pad_edge=False, header_style="bold")
    for name in records[0] if records else ():
        table.add_column(name.replace("_", " "), overflow="fold")
    for record in records:
        table.add_row(*(escape(_words(value)) for value in record.values()))
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or another program
        console.width = ENDLESS
    console.print(table)


def check_targets(delivery: Delivery, kind: type[Result] = Result) -> None:
    """ResultError when one of the places to write to cannot take a result: known before the run, not after it.

    ``kind`` is that of the result, where it is known before.
    """
    from cutaway.core.result_file import OURS
    from cutaway.results.graph import Graph
    from cutaway.results.kind import FOREIGN, WRITERS

    for path in delivery.places:
        if path.name.endswith(FOREIGN) and not (issubclass(kind, Graph) or issubclass(Graph, kind)):
            found = f"what comes out is a {kind.__name__}, and only graphs have that form"
            raise ResultError(f"writing {str(path)!r}", found, f"use one of {', '.join(WRITERS)}")
        if path.suffix and path.suffix not in WRITERS and not path.name.endswith(FOREIGN):
            hint = f"use one of {', '.join(WRITERS)}, or a name without a dot for a folder"
            raise ResultError(f"writing {str(path)!r}", f"there is no writer for {path.suffix!r}", hint)
        if not path.suffix and path.exists() and (not path.is_dir() or any(path.iterdir())):
            asked = f"saving to {str(path)!r}"
            if not delivery.overwrite:
                raise ResultError(asked, "it exists", "add --overwrite, or choose another folder")
            other = "a file" if not path.is_dir() else next((e.name for e in path.iterdir() if e.name not in OURS), "")
            if other:
                raise ResultError(asked, f"it is or holds {other}, which is no result", "choose another folder")
        _check_room(path)


def _check_room(path: Path) -> None:
    """ResultError when nothing can be made where ``path`` will lie: something is made there, and taken away again."""
    there = next(each for each in path.absolute().parents if each.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".cutaway-", dir=there):
            pass
    except OSError as error:
        found = f"nothing can be made in {str(there)!r} ({error.strerror or error})"
        raise ResultError(f"writing {str(path)!r}", found, "choose another place") from None


def deliver(result: Result, delivery: Delivery) -> None:
    """A result in every place asked for: a file by its suffix, a folder without one, and standard output."""
    _write(result, delivery.places, delivery.overwrite)
    if delivery.json:
        from cutaway.core.result_file import to_json

        sys.stdout.write(to_json(result) + "\n")
    else:
        show(result.summary())


def deliver_rows(table: Table, delivery: Delivery) -> None:
    """As ``deliver``, for a table that is read row by row: standard output shows every row, JSON is a list of them."""
    _write(table, delivery.places, delivery.overwrite)
    if not delivery.json:
        show_lines(table.title)
    show_rows(table.table().to_dict("records"), delivery.json)
    if not delivery.json and table.notes:
        show_lines(*table.notes)


def deliver_records(records: Sequence[Mapping[str, Any]], title: str, delivery: Delivery) -> None:
    """As ``deliver_rows``, for records with parts in them: whole in JSON, each part as text elsewhere."""
    from cutaway.results.table import Table

    columns = {name: [_words(record[name]) for record in records] for name in (records[0] if records else ())}
    for path in (each for each in delivery.places if each.suffix == ".json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json_text(records) + "\n", encoding="utf-8")
        remark(f"wrote {path}")
    table = Table(title=title, columns=columns)
    _write(table, [path for path in delivery.places if path.suffix != ".json"], delivery.overwrite)
    show_rows(records, delivery.json)


def _write(result: Result, out: Sequence[Path], overwrite: bool) -> None:
    for path in out:
        written = result.write(path) if path.suffix else result.save(path, overwrite=overwrite)
        remark(f"wrote {written}")


def _record(row: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(row) and not isinstance(row, type):
        return {each.name: getattr(row, each.name) for each in dataclasses.fields(row)}
    return dict(row) if isinstance(row, Mapping) else dict(row._asdict())


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple) and all(isinstance(each, str | int | float) for each in value):
        return ", ".join(map(str, value))
    if isinstance(value, Mapping) and all(isinstance(each, str) for each in value.values()):
        return "; ".join(f"{name}: {each}" for name, each in value.items())
    nested = isinstance(value, list | tuple | Mapping)
    return json.dumps(_jsonable(value), indent=1, ensure_ascii=False) if nested else str(value)


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _jsonable(_record(value))
    if isinstance(value, Mapping):
        return {str(key): _jsonable(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_jsonable(each) for each in value]
    return value if value is None or isinstance(value, str | int | bool) else str(value)
