"""Readout: the tokens that each layer and position would say, as the logit lens reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cutaway.core.errors import ResultError
from cutaway.core.result import Array, over
from cutaway.results import drawing
from cutaway.results.kind import Kind

if TYPE_CHECKING:
    import pandas

ROOM, WIDEST, NARROWEST, LINE = 1500, 74, 40, 19
HEIGHT, TEXT_ROOM = 620, 13  # below TEXT_ROOM pixels a cell cannot hold a line of text
PERCENT_ON_DARK = 0.5


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Readout(Kind, kind="readout"):
    """The k most likely tokens at every layer and position, best first.

    Args:
        tokens: strings [layer, position, k].
        ids: their ids [layer, position, k].
        log_probs: their log-probabilities in nats [layer, position, k].
        target: the token that was asked about; then ``target_log_prob`` [layer, position] in nats and
            ``target_rank`` [layer, position] (0 is the most likely) are given too.
    """

    tokens: Array = field(metadata=over("layer", "position", "k"))
    ids: Array = field(metadata=over("layer", "position", "k"))
    log_probs: Array = field(metadata=over("layer", "position", "k"))
    target: str = ""
    target_log_prob: Array = field(default=None, metadata=over("layer", "position"))
    target_rank: Array = field(default=None, metadata=over("layer", "position"))
    unit: str = "nats"

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.target) != (self.target_log_prob is not None):
            found = f"target={self.target!r} {'without' if self.target else 'with'} target_log_prob"
            raise ResultError("a readout", found, "give both or neither")

    def table(self) -> pandas.DataFrame:
        """One row per layer, position and place k: token, id, log_prob, probability, and the target's numbers."""
        table = self.long_table("tokens", "ids", "log_probs").rename(
            columns={"tokens": "token", "ids": "id", "log_probs": "log_prob"}
        )
        table["probability"] = np.exp(table["log_prob"].astype(float))
        for name in ("target_log_prob", "target_rank"):
            value = getattr(self, name)
            if value is not None:
                table[name] = np.repeat(value.ravel(), self.tokens.shape[-1])
        return table

    def highlights(self) -> pandas.DataFrame:
        """The most likely token of every layer at the last position, last layer first."""
        table = self.table()
        k, last = self.along("k"), self.tokens.shape[1] - 1
        if not k or last < 0:
            return table
        place = table["position_index" if "position_index" in table else "position"]
        if "position_index" not in table:
            last = self.along("position")[-1]
        keep = table[(table["k"] == k[0]) & (place == last)]
        return keep.iloc[::-1].drop(columns=["k"])

    def spec(self, target: bool = False) -> drawing.Spec:
        """Top-1 token in every cell, coloured by its probability, layer 0 at the bottom; with ``target`` coloured by
        the target's probability instead."""
        if target and self.target_log_prob is None:
            raise ResultError("target=True", "this readout has no target", "run the method with a target")
        layers, positions, k = self.tokens.shape
        names, places = self.along("layer"), self.along("position")
        width = drawing.step(positions, ROOM, WIDEST, smallest=5)
        height = drawing.step(layers, HEIGHT, LINE + 3, smallest=5)
        written = k > 0 and width >= NARROWEST and height >= TEXT_ROOM
        source = (
            self.target_log_prob if target else self.log_probs[..., 0] if k else np.full((layers, positions), np.nan)
        )
        chance: np.ndarray = np.exp(source.astype(np.float64))
        rows = []
        for i, j in np.ndindex(layers, positions):
            top = [f"{drawing.shown(self.tokens[i, j, n])} {np.exp(self.log_probs[i, j, n]):.1%}" for n in range(k)]
            value = drawing.finite(chance[i, j])
            row = {"x": j, "y": i, "layer": str(names[i]), "position": f"{j} {drawing.shown(places[j])}"}
            row |= {"value": value, "shown": f"{chance[i, j]:.1%}", "top": ", ".join(top[:5])}
            if written:
                row |= {"cell": drawing.shown(self.tokens[i, j, 0], 10), "high": (value or 0) > PERCENT_ON_DARK}
            rows.append(row)
        letters = int((width - 4) / drawing.CHARACTER_PIXELS) if written else drawing.LONGEST_LABEL
        says = f"p({drawing.shown(self.target)})" if target else "p(top token)"
        colors = drawing.color(says, np.array([0.0, 1.0]), signed=False, length=height * layers)
        colors["legend"]["format"] = ".0%"
        body = drawing.heat(
            x=drawing.axis(places, "Position (token read there)", width, horizontal=True, longest=letters),
            y=drawing.axis(names, "Layer", height, horizontal=False),
            colors=colors,
            tooltip=["layer", "position", "top"],
            width={"step": width},
            height={"step": height},
            rising=True,
            text=written,
        )
        return drawing.document({"data": {"values": rows}, **body}, drawing.heading(self.title, *self.caption()))
