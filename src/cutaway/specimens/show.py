"""Specimens as text: the list, a card, and a training run with its bar. What the command line prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from . import registry, series


def listing() -> list[dict[str, str]]:
    """One row per specimen: name, kind, size, skills, and its accuracies in short."""
    rows = []
    for name in registry.names():
        card = registry.card(name)
        figures = ", ".join(f"{figure} {value:.2f}" for figure, value in card.accuracies.items())
        rows.append(
            {
                "specimen": name,
                "kind": card.kind,
                "size": f"{card.size / 1e6:.1f} MB",
                "skills": ", ".join(card.skills),
                "accuracies": figures,
            }
        )
    return rows


def table() -> str:
    """The list as a Markdown table, as docs/specimens.md shows it."""
    lines = ["| Specimen | Class | Size | What it is |", "|---|---|---|---|"]
    for name in registry.names():
        card = registry.card(name)
        lines.append(f"| `{name}` | `{card.architecture}` | {card.size / 1e6:.1f} MB | {card.title} |")
    return "\n".join(lines)


def described(name: str) -> str:
    """A card as text: what it is, what it can do, what is known, and prompts with the answers it gives.

    Raises:
        LoadError: no specimen has this name.
    """
    card = registry.card(name)
    lines = [
        f"{card.name}: {card.title}",
        f"{card.kind}, {card.architecture}, {card.parameters:,} parameters, {card.size / 1e6:.2f} MB",
        f"data: {card.data}",
        f"recipe: {card.recipe} (seed {card.seed})",
        f"licence: {card.licence}",
    ]
    if card.training:
        lines.append(
            f"trained: {card.training['steps']} steps, {card.training['seconds']} s, {card.training['machine']}"
        )
    lines += ["", "accuracies"]
    lines += [f"  {value:5.3f}  {figure}" for figure, value in card.accuracies.items()]
    lines += ["", "prompts and answers"]
    lines += [f"  {example['prompt']} ->{example['answer']}" for example in card.examples]
    lines += ["", "known"]
    lines += [f"  {truth}: {_short(value)}" for truth, value in card.truths.items()]
    if card.notes:
        lines += ["", "notes", *(f"  {note}" for note in card.notes)]
    return "\n".join(lines)


def train(name: str, *, checkpoints: int = 24, seed: int | None = None, cache: Path | None = None) -> series.Series:
    """``series.train`` with a progress bar on a terminal, and without one elsewhere.

    Raises:
        LoadError, ParameterError: as ``series.train``.
    """
    from tqdm import tqdm

    with tqdm(desc=name, unit=" steps", disable=not sys.stderr.isatty()) as bar:

        def tell(done: int, steps: int, loss: float) -> None:
            bar.total = steps
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update(done - bar.n)

        return series.train(name, checkpoints=checkpoints, seed=seed, cache=cache, progress=tell)


WIDEST = 160


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."
