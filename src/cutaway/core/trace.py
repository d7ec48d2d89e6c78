"""Trace: what one watched forward pass saw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from cutaway.core.errors import SiteMissingError, nearest
from cutaway.core.inputs import Inputs
from cutaway.core.site import Site, SiteLike


class Trace(Mapping[Site, Tensor]):
    """Activations by site, in the order of the forward pass, and the logits.

    ``trace["L3.resid_post"]`` and ``trace[Site(...)]`` are the same. Axes are never dropped: a site at one head and
    one position keeps both axes with size 1. Wildcards are read with ``stack``.

    Attributes:
        logits: [batch, pos, vocab]; None when the run stopped before the end.
        inputs: what was run.
        grads: gradient of the metric at each site, when ``grad`` was asked for.
        value: [batch] the metric whose gradient was taken; None without ``grad``.
    """

    def __init__(
        self,
        inputs: Inputs,
        values: dict[Site, Tensor],
        logits: Tensor | None,
        grads: dict[Site, Tensor] | None = None,
        value: Tensor | None = None,
        n_layers: int = 0,
    ) -> None:
        self.inputs, self.logits, self.value = inputs, logits, value
        self._values, self._n_layers = values, n_layers
        self.grads = Trace(inputs, grads, None, n_layers=n_layers) if grads is not None else None

    def __getitem__(self, site: SiteLike) -> Tensor:
        key = Site.parse(site) if isinstance(site, str) else site
        if key not in self._values and key.layers is not None:
            key = key.expand(self._n_layers)[0] if self._n_layers else key
        if key not in self._values:
            kept = [str(s) for s in self._values]
            hint = nearest(str(key), kept) or "name it in want="
            raise SiteMissingError(f"site '{key}' of this trace", f"it holds {len(kept)} sites, not this one", hint)
        return self._values[key]

    def __contains__(self, site: object) -> bool:
        return (Site.parse(site) if isinstance(site, str) else site) in self._values

    def __iter__(self) -> Iterator[Site]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def stack(self, site: SiteLike) -> Tensor:
        """[layer, ...] the tensors of a site over its layers, in layer order."""
        key = Site.parse(site) if isinstance(site, str) else site
        return torch.stack([self[s] for s in key.expand(self._n_layers)])

    def __repr__(self) -> str:
        rows = [f"  {s}  {list(t.shape)}" for s, t in list(self._values.items())[:40]]
        more = f"\n  ... {len(self) - 40} more" if len(self) > 40 else ""
        return "\n".join([f"Trace of {len(self)} sites", *rows]) + more
