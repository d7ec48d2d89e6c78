"""Explanation: what produced one answer, told from the results of several methods, with its proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cutaway.core.errors import ResultError, nearest
from cutaway.core.forms.base import IN_MEMORY
from cutaway.core.proof import Proof
from cutaway.core.result import Array, Result, of_results, over
from cutaway.core.result_file import PAGE, TABLES, WHOLE, put, to_json
from cutaway.results import drawing
from cutaway.results.kind import Kind
from cutaway.results.ranking import Ranking
from cutaway.results.table import Table

if TYPE_CHECKING:
    import pandas

DRAWN = ("image_patches", "heads", "layers", "lens")
"""The part that stands for the whole in one picture: the first of these that is there."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Explanation(Kind, kind="explanation"):
    """What produced an answer: the results of the methods that were asked, and what they say in plain words.

    Args:
        model: who answers. prompt: what was asked. tokens, roles: of each position [position].
        image: PNG bytes [byte].
        answers, answer_log_probs: what the model says next, best first [answer], in nats.
        target, log_prob, rank: the token that is explained, its log-probability and its place (0 = first); versus: its
            rival, "" without one.
        story: what happened, in sentences. caveats: what to keep in mind about it.
        parts: the results, by name. refused: why a part is missing, by name.
    """

    model: str = ""
    prompt: str = ""
    tokens: Array = field(metadata=over("position"))
    roles: Array = field(metadata=over("position"))
    answers: Array = field(metadata=over("answer"))
    answer_log_probs: Array = field(metadata=over("answer"))
    image: Array = field(default=None, metadata=over("byte"))
    target: str = ""
    log_prob: float = float("nan")
    rank: int = 0
    versus: str = ""
    story: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()
    parts: Mapping[str, Result] = field(default_factory=dict, metadata=of_results())
    refused: dict[str, str] = field(default_factory=dict)
    unit: str = "nats"

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = next((name for name, part in self.parts.items() if not isinstance(part, Kind)), None)
        if wrong is not None:
            raise ResultError(f"part {wrong!r} of an explanation", f"it is {self.parts[wrong]!r}", "give a result")

    def __getitem__(self, name: str) -> Any:
        """A part by its name."""
        if name in self.refused:
            raise ResultError(f"part {name!r}", self.refused[name])
        if name not in self.parts:
            hint = nearest(name, self.parts) or f"there are {', '.join(self.parts)}"
            raise ResultError(f"part {name!r}", "this explanation has none of that name", hint)
        return self.parts[name]

    @property
    def proofs(self) -> dict[str, Proof]:
        """The causal proofs of the parts that have one, by name."""
        return {name: part.proof for name, part in self.parts.items() if part.proof is not None}

    @property
    def unproved(self) -> tuple[str, ...]:
        """Parts whose proof fails: taking away what they name does no more than taking away random others."""
        return tuple(name for name, proof in self.proofs.items() if not proof.holds)

    @property
    def proved(self) -> bool:
        """Whether there are proofs, and all of them hold, that of the whole among them."""
        return bool(self.proofs) and not self.unproved and (self.proof is None or self.proof.holds)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The parts that were refused, those with the same reason together."""
        parts: dict[str, list[str]] = {}
        for name, why in self.refused.items():
            parts.setdefault(why, []).append(name.replace("_", " "))
        return tuple(f"{', '.join(names)}: {why}" for why, names in parts.items())

    @property
    def command(self) -> str:
        """The command line that makes it again; "" where it was made of what no command line says."""
        if self.made_by is None or any(text.startswith(IN_MEMORY) for text in self.made_by.params.values()):
            return ""
        return self.made_by.command()

    def table(self) -> pandas.DataFrame:
        """Every component that a part ranks: part, item, score, unit."""
        import pandas

        frames = [
            pandas.DataFrame({"part": name, "item": part.items, "score": part.scores, "unit": part.unit})
            for name, part in self.parts.items()
            if isinstance(part, Ranking)
        ]
        empty = pandas.DataFrame({"part": [], "item": [], "score": [], "unit": []})
        return pandas.concat(frames, ignore_index=True) if frames else empty

    def spec(self, part: str = "") -> drawing.Spec:
        """The picture of one part; of the first of image patches, heads, layers and lens when none is named."""
        name = part or next((each for each in DRAWN if each in self.parts), next(iter(self.parts), ""))
        if not name:
            return self.answer_table().spec()
        return dict(self[name].spec())

    def answer_table(self) -> Table:
        """What the model says next, with its probability."""
        chance = np.exp(self.answer_log_probs.astype(np.float64))
        return Table(title=self.title, columns={"token": self.answers, "probability": chance})

    def summary(self) -> Any:
        from cutaway.results.telling.screen import screen

        return screen(self)

    def page(self, **options: Any) -> str:
        """The report as one HTML file that fetches nothing; it has no options."""
        from cutaway.results.telling.page import page

        if options:
            raise ResultError(f"a report with {', '.join(options)}", "it shows every part as it is")
        return page(self)

    def files(self) -> dict[str, bytes]:
        """What ``save`` writes: the report, the whole explanation as JSON, and the table of every part."""
        found = {PAGE: self.page().encode("utf-8", "backslashreplace"), WHOLE: to_json(self).encode()}
        for name, part in self.parts.items():
            found[f"{TABLES}/{name}.csv"] = part.table().to_csv(index=False).encode("utf-8", "backslashreplace")
        return found

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write ``report.html``, ``explanation.json`` and the tables, all or nothing; ``cutaway.open`` reads them."""
        return put(self.files(), Path(folder), overwrite, f"saving an explanation to {str(folder)!r}")
