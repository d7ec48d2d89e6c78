"""An explanation on a terminal: the report's order in one screenful."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cutaway.ops.units import Unit
from cutaway.results.ranking import Ranking
from cutaway.results.table import Table as Rows
from cutaway.results.telling.words import NOUNS, goal, lengths, percent, place, signed, spoken, token

if TYPE_CHECKING:
    from cutaway.results.explanation import Explanation

ALTERNATIVES, BAR = 5, 5
WIDTHS = (31, 20, 8, BAR, None)
LINES = {
    "layers": 3,
    "heads": 3,
    "head_positions": 2,
    "ffn_neurons": 3,
    "attention_neurons": 2,
    "query_neurons": 2,
}
"""How many components of each part are shown."""


def screen(told: Explanation) -> Any:
    """One rich renderable of about 40 lines at 100 columns."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text(told.title, style="bold")]
    if told.unproved:
        failed = ", ".join(NOUNS.get(name, name) for name in told.unproved)
        parts.append(Text(f"⚠ not proved: {failed} (no more than random ones at 95 %)", style="bold yellow"))
    if told.proof is not None:
        parts.append(Text(f"proof: {told.proof}", style="green" if told.proof.holds else "bold yellow"))
    parts += [_answers(told), Text(), Text(" ".join(told.story)), Text()]
    parts += [Text(f"scores of {goal(told)}; under each name what is lost without those named", style="dim")]
    parts.append(_components(told))
    parts += [Text(f"caveat: {each}", style="yellow") for each in told.caveats]
    parts += [Text(f"left out: {each}", style="dim") for each in told.left_out]
    parts += [Text(f"note: {note}", style="yellow") for note in told.notes]
    if told.command:
        parts.append(Text(f"again: {told.command}", style="dim"))
    return Group(*parts)


def _answers(told: Explanation) -> Any:
    from rich.text import Text

    chances = np.exp(told.answer_log_probs.astype(np.float64)).tolist()
    line = Text()
    for i, (answer, chance) in enumerate(list(zip(told.answers, chances, strict=True))[:ALTERNATIVES]):
        line.append(f"{token(answer)} {percent(chance)}", style="bold green" if not i else "")
        line.append("   ")
    return line


def _components(told: Explanation) -> Any:
    from rich.bar import Bar
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1, 0, 0), expand=True)
    for width in WIDTHS:
        table.add_column(no_wrap=True, overflow="ellipsis", width=width, ratio=None if width else 1)
    for name, most_lines in LINES.items():
        part = told.parts.get(name)
        if not isinstance(part, Ranking) or not len(part):
            continue
        for i, length in enumerate(lengths(part)[:most_lines]):
            score = float(part.scores[i])
            bar = Bar(1, 0, length, width=BAR, color="green" if score > 0 else "red")
            left = [Text(NOUNS[name], style="bold"), _lost(part)][i] if i < 2 else Text()
            table.add_row(
                left, spoken(str(part.items[i]), "L"), f"{signed(score):>8}", bar, _beside(told, name, part, i)
            )
    return table


def _lost(part: Ranking) -> Any:
    from rich.text import Text

    if part.proof is None:
        return Text()
    drop, random = float(part.proof.effect[-1]), float(part.proof.random[:, -1].mean())
    mark, style = ("✓", "green") if part.proof.holds else ("⚠", "yellow")
    return Text(f"{mark} {-drop:.3g}, random {-random:.1g} (k={part.proof.ks[-1]})", style=style)


def _beside(told: Explanation, name: str, part: Ranking, i: int) -> Any:
    from rich.text import Text

    if "source token" in part.columns:
        return Text(f"from {place(told, Unit.parse(part.items[i]).source)}", style="dim")
    writes = told.parts.get("writes")
    if name == "ffn_neurons" and isinstance(writes, Rows):
        found = dict(zip(writes.columns["component"], writes.columns["raises"], strict=True))
        words = [each.rpartition(" ")[0] for each in str(found.get(part.items[i], "")).split(", ")]
        return Text(f"raises {', '.join(words)}", style="dim")
    return Text("")
