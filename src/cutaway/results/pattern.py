"""Pattern: which key position each query position attends to, per layer and head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cutaway.core.result import Array, over
from cutaway.results import drawing
from cutaway.results.kind import Kind

if TYPE_CHECKING:
    import pandas

PANELS, CELLS = 24, 40_000  # more panels are thumbnails no one can read; more cells make a page slow
ROOM, CELL = 880, 26


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Pattern(Kind, kind="pattern"):
    """Attention ``pattern`` [layer, head, query, key], rows summing to 1; NaN where a key is masked or padding.

    Label ``layer`` and ``head`` with the numbers that were asked for, ``query`` and ``key`` with the token strings.
    """

    pattern: Array = field(metadata=over("layer", "head", "query", "key"))
    unit: str = "probability"

    def entropy(self) -> np.ndarray:
        """Entropy of every row in nats, [layer, head, query]: 0 looks at one place, log(keys) at all alike."""
        p = np.nan_to_num(self.pattern.astype(np.float64))
        return np.asarray(-np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(axis=-1))

    def table(self) -> pandas.DataFrame:
        """One row per head: mean entropy (nats), mean weight on itself, the token before and the first token, and
        the largest weight with its query and key."""
        import pandas

        layers, heads, queries, keys = self.pattern.shape
        p = np.nan_to_num(self.pattern.astype(np.float64))
        entropy = self.entropy()
        shift = keys - queries  # queries are the last ones when only some positions were read
        own, before = np.arange(queries) + shift, np.arange(1, queries) + shift - 1
        rows = []
        for i, j in np.ndindex(layers, heads):
            head = p[i, j]
            row: dict[str, Any] = {"layer": self.along("layer")[i], "head": self.along("head")[j]}
            row["entropy"] = entropy[i, j].mean() if queries else np.nan
            row["self"] = _mean(head[np.arange(queries), own]) if shift >= 0 else np.nan
            row["previous"] = _mean(head[np.arange(1, queries), before]) if shift >= 0 else np.nan
            row["first"] = _mean(head[:, 0]) if keys else np.nan
            if head.size:
                q, k = np.unravel_index(int(head.argmax()), head.shape)
                row |= {"largest": head[q, k], "query": self.along("query")[q], "key": self.along("key")[k]}
            rows.append(row)
        return pandas.DataFrame(rows)

    def highlights(self) -> pandas.DataFrame:
        """Heads from the most pointed to the most diffuse."""
        table = self.table()
        return table.sort_values("entropy", kind="stable") if len(table) else table

    def spec(self, layer: Any = None, head: Any = None) -> drawing.Spec:
        """Heat maps of the heads chosen by ``layer`` and ``head``; all of them side by side when they stay readable,
        else the map of mean entropies over layer and head, from which to choose."""
        layers, heads = self.along("layer"), self.along("head")
        chosen = [
            (i, j)
            for i in ([self.option("layer", layer, "layer")] if layer is not None else range(len(layers)))
            for j in ([self.option("head", head, "head")] if head is not None else range(len(heads)))
        ]
        queries, keys = self.pattern.shape[2:]
        if len(chosen) > PANELS or (len(chosen) * queries * keys > CELLS and len(chosen) > 1):
            return self._overview()
        across = min(len(chosen), 4) or 1
        pixels = drawing.step(max(queries, keys), ROOM / across - 60, CELL, smallest=2)
        q_labels, k_labels = self.along("query"), self.along("key")
        rows = [
            {"panel": n, "x": k, "y": q, "query": drawing.shown(q_labels[q]), "key": drawing.shown(k_labels[k])}
            | {"value": drawing.finite(value := float(self.pattern[i, j, q, k])), "shown": drawing.digits(value)}
            for n, (i, j) in enumerate(chosen)
            for q, k in np.ndindex(queries, keys)
        ]
        body = drawing.heat(
            x=drawing.axis(k_labels, "Key (attended to)", pixels, horizontal=True),
            y=drawing.axis(q_labels, "Query (attending)", pixels, horizontal=False),
            colors=drawing.color("Attention weight", np.array([0.0, 1.0]), signed=False, length=pixels * queries),
            tooltip=["query", "key"],
            width={"step": pixels},
            height={"step": pixels},
            rising=False,
        )
        names = [f"layer {layers[i]} · head {heads[j]}" for i, j in chosen]
        if len(chosen) > 1:
            body = drawing.panels(body, names, "", across)
        heading = drawing.heading(self.title, *self.caption(), names[0] if len(names) == 1 else "")
        return drawing.document({"data": {"values": rows}, **body}, heading)

    def _overview(self) -> drawing.Spec:
        from cutaway.results.grid import Grid

        mean = self.entropy().mean(axis=-1)
        grid = Grid(
            values=mean,
            axes=("layer", "head"),
            labels={dim: names for dim, names in self.labels.items() if dim in ("layer", "head")},
            measure="mean entropy",
            unit="nats",
            scale="sequential",
        )
        hint = "too many heads to draw at once: choose with layer=, head="
        return {**grid.spec(), "title": drawing.heading(self.title, *self.caption(), hint)}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
