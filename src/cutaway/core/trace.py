"""Trace: what one watched forward pass saw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cutaway.core.errors import SiteError, SiteMissingError, nearest
from cutaway.core.inputs import Inputs
from cutaway.core.site import Site, SiteLike


class Trace(Mapping[Site, Tensor]):
    """Activations by site, in the order of the forward pass, and the logits.

    ``trace["L3.resid_post"]`` and ``trace[Site(...)]`` are the same, and so is the module path that was asked for. Axes
    are never dropped: a site at one head and one position keeps both axes with size 1. Wildcards are read with
    ``stack``.

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
        depths: Mapping[str, int] | None = None,
        names: Mapping[str, Site] | None = None,
    ) -> None:
        self.inputs, self.logits, self.value = inputs, logits, value
        self._values, self._depths, self._names = values, depths or {}, names or {}
        self.grads = Trace(inputs, grads, None, depths=depths, names=names) if grads is not None else None

    def _key(self, site: SiteLike) -> Site:
        key = (self._names.get(site) or Site.parse(site)) if isinstance(site, str) else site
        if key in self._values or key.layers is None:
            return key
        found = key.expand(self._depths[key.scope]) if key.scope in self._depths else [key]
        return found[0] if len(found) == 1 else key

    def __getitem__(self, site: SiteLike) -> Tensor:
        key = self._key(site)
        if key not in self._values:
            kept = [str(s) for s in self._values]
            hint = nearest(str(key), kept) or "name it in want="
            raise SiteMissingError(f"site '{key}' of this trace", f"it holds {len(kept)} sites, not this one", hint)
        return self._values[key]

    def __contains__(self, site: object) -> bool:
        try:
            return isinstance(site, str | Site) and self._key(site) in self._values
        except SiteError:
            return False

    def __iter__(self) -> Iterator[Site]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def stack(self, site: SiteLike) -> Tensor:
        """[layer, ...] the tensors of a site over its layers, in layer order; ``L*`` is every layer that was read."""
        key = self._key(site)
        if key.layers is None:
            found = sorted((s for s in self._values if replace(s, layers=None) == key), key=lambda s: s.layer)
            return torch.stack([self[s] for s in found or [key]])
        return torch.stack([self[s] for s in key.expand(self._depths.get(key.scope, 0))])

    def __repr__(self) -> str:
        rows = [f"  {s}  {list(t.shape)}" for s, t in list(self._values.items())[:40]]
        more = f"\n  ... {len(self) - 40} more" if len(self) > 40 else ""
        return "\n".join([f"Trace of {len(self)} sites", *rows]) + more
