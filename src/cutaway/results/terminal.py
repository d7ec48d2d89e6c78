"""A result in a terminal: one screenful, and what was left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cutaway.results.kind import cell_text

if TYPE_CHECKING:
    from cutaway.results.kind import Kind

ROWS, COLUMNS, TEXT = 12, 8, 28


def summary(result: Kind) -> Any:
    """Title, shapes, the rows that matter, check, proof and notes, as one rich renderable."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = result.highlights()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in rows.columns[:COLUMNS]:
        table.add_column(Text(str(name)), justify="right" if rows[name].dtype.kind in "if" else "left", no_wrap=True)
    for row in rows.iloc[:ROWS, :COLUMNS].itertuples(index=False):
        table.add_row(*(Text(_short(cell_text(each))) for each in row))
    left_out = []
    if len(rows) > ROWS:
        left_out.append(f"{len(rows) - ROWS:,} of {len(rows):,} rows")
    if len(rows.columns) > COLUMNS:
        left_out.append(f"the columns {', '.join(map(str, rows.columns[COLUMNS:]))}")
    parts: list[Any] = [Text(result.title or result.kind, style="bold"), Text(repr(result), style="dim"), table]
    if left_out:
        parts.append(Text(f"not shown: {' and '.join(left_out)} (table() has all)", style="dim"))
    for evidence in (result.check, result.proof):
        if evidence is not None:
            name = type(evidence).__name__.lower()
            parts.append(Text(f"{name}: {evidence}", style="green" if evidence.holds else "bold yellow"))
    parts += [Text(f"note: {note}", style="yellow") for note in result.notes]
    return Group(*parts)


def _short(text: str) -> str:
    return text if len(text) <= TEXT else text[: TEXT - 1] + "…"
