"""What runs of several interventions do inside one layer, on packed rows.

The first intervention of such a run may stand before a second one that sees what the first has changed, so each is
applied to the run's own rows at its own place, as in a whole forward pass, while the layer is called on all rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Apply, Intervention, Where
from cutaway.core.site import KINDS, Site
from cutaway.models.handle import Model
from cutaway.models.region import Region, Window
from cutaway.models.watch import Done, Watch

HEADED = ("attn.q", "attn.k", "attn.v", "attn.z")
"""Kinds that the walk itself has in hand, where it answers for the attention function."""


@dataclass(frozen=True)
class Line:
    """One intervention of a run.

    Attributes:
        intervention, site: what it does, at one concrete site.
        positions: where, in the prompt.
        real: which of the positions hold real tokens, as interventions are told; None when all do.
    """

    intervention: Intervention
    site: Site
    positions: tuple[int, ...]
    real: Tensor | None

    @staticmethod
    def of(item: Intervention, inputs: Inputs) -> Line:
        """The line of an intervention whose site names one layer."""
        site = item.site
        real = None
        if site.positions is None and inputs.padded:
            mask = inputs.mask.bool()
            real = mask.view(*mask.shape, *[1] * (len(KINDS[site.kind].axes) - 2))
        return Line(item, site, tuple(inputs.select(site.positions, f"run '{item}'")[0]), real)


class Script:
    """The lines that are due in one layer, each with the packed rows that it acts on.

    Args:
        due: (line, rows), rows [k] of the line's positions among the packed ones.
        rows: how many rows are packed.
    """

    def __init__(self, model: Model, due: Iterable[tuple[Line, Sequence[int]]], rows: int) -> None:
        self.model = model
        self.window = Window(None, [list(range(rows))])
        self._due: Mapping[str, list[tuple[Line, Sequence[int]]]] = defaultdict(list)
        for line, at in due:
            self._due[line.site.kind].append((line, at))

    def __call__(self, kind: str, x: Tensor) -> Tensor:
        """``x`` [1, rows, ...] in the axes of its kind, after what is due there; ``x`` itself where nothing is."""
        if not self._due.get(kind):
            return x
        new = x.clone()
        for line, at in self._due[kind]:
            region = Region(line.site.at(positions=at), x.shape, self.window)
            where = Where(line.site, KINDS[kind].axes, line.real)
            region.write(new, line.intervention(region.get(new).clone(), where))
        return new

    def heads_first(self, kind: str, x: Tensor) -> Tensor:
        """The same for ``x`` [1, head, rows, d]."""
        return self(kind, x.transpose(1, 2)).transpose(1, 2) if self._due.get(kind) else x

    def around_layer(self) -> AbstractContextManager[object]:
        """While open, the layer's own modules do what is due outside of its attention function."""
        kinds = [(kind, due[0][0].site) for kind, due in self._due.items() if kind not in HEADED]
        if not kinds:
            return nullcontext()
        whole = [(kind, site.whole().at()) for kind, site in kinds]
        done = [Done(site, Apply(site, lambda x, where, kind=kind: self(kind, x))) for kind, site in whole]  # type: ignore[misc]
        return Watch(self.model.hf, self.model.anatomy(), (), done, window=self.window)
