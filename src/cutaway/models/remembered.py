"""A model that runs one prompt once: what was seen of it is handed out again."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cutaway.core.inputs import Inputs
from cutaway.core.site import KINDS, Site
from cutaway.core.trace import Trace
from cutaway.models.handle import Model

POSITIONS = ("pos", "query_pos")
PREFETCHED = 64 * 2**20
"""Bytes of activations of all positions that are kept ahead; of longer prompts those of the last one are."""
EVERYWHERE = ("resid_pre", "attn.out", "mlp.out", "resid_mid", "attn.v")
LAST = ("attn.z", "attn.pattern", "mlp.act", "mlp.in", "resid_post")


class Remembered(Model):
    """The model itself, for many readings of one prompt.

    A trace without interventions and gradients is put together from what earlier ones saw, and runs the model for the
    rest alone; its sites stand in the order they were asked for. Where somebody else listens to the model's modules, it
    is run: they want to hear it.
    """

    _prompt: str
    _hooks: int
    _seen: dict[Site, Tensor]
    _logits: Tensor | None

    @classmethod
    def of(cls, model: Model, inputs: Inputs) -> Remembered:
        """``model``, remembering what it does with ``inputs``."""
        model.anatomy(inputs)
        found = copy.copy(model)
        found.__class__ = cls
        if not isinstance(found, cls):
            raise TypeError(f"{model!r} cannot be remembered")
        found._prompt, found._seen, found._logits = inputs.digest, {}, None
        found._hooks = found._listeners()
        return found

    def prefetch(self, inputs: Inputs) -> None:
        """See at once what the methods of an explanation read; what this model does not have, they say themselves."""
        config: Any = self.hf.config
        layers = self.layers
        size = 4 * sum(plan.has(kind) for plan in layers for kind in EVERYWHERE) * inputs.ids.shape[1]
        size *= getattr(config.get_text_config(), "hidden_size", 0)
        want = [
            f"L{i}.{kind}" + ("" if kind in EVERYWHERE and size <= PREFETCHED else "@-1")
            for i, plan in enumerate(layers)
            for kind in (*EVERYWHERE, *LAST)
            if plan.has(kind) and (kind != "attn.v" or size <= PREFETCHED)
        ]
        self.trace(inputs, want=want)

    def __call__(self, inputs: Any) -> Tensor:
        batch = self.inputs(inputs)
        if self._logits is None or not self._remembers(batch):
            return super().__call__(batch)
        return self._logits

    def trace(
        self, inputs: Any, want: Any = (), do: Any = (), grad: Any = False, *, stop: bool = False, **options: Any
    ) -> Trace:
        batch = self.inputs(inputs)
        if do or grad or any(value is not None for value in options.values()) or not self._remembers(batch):
            return super().trace(batch, want, do, grad, stop=stop, **options)
        sites = list(dict.fromkeys(self.expand(want, batch)))
        values = {site: self._look_up(site, batch) for site in sites}
        missing = [site for site, value in values.items() if value is None]
        if missing or (self._logits is None and not stop):
            found = super().trace(batch, missing, stop=stop and bool(missing))
            self._seen |= dict(found.items())
            self._logits = found.logits if self._logits is None else self._logits
        kept = {site: self._seen[site] if value is None else value for site, value in values.items()}
        depths = {scope: len(stack) for scope, stack in self.anatomy(batch).stacks.items()}
        return Trace(batch, kept, None if stop else self._logits, depths=depths, names=dict(self._sites(want)))

    def _remembers(self, inputs: Inputs) -> bool:
        return inputs.digest == self._prompt and self._listeners() == self._hooks

    def _listeners(self) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.hf.modules())

    def _look_up(self, site: Site, inputs: Inputs) -> Tensor | None:
        """A site that was seen, or that part of a whole one."""
        if site in self._seen:
            return self._seen[site]
        whole = self._seen.get(replace(site, positions=None))
        axes = KINDS[site.kind].axes
        at = next((i for i, axis in enumerate(axes) if axis in POSITIONS), None)
        if whole is None or at is None or len(inputs) != 1 or site.scope:
            return None
        places = inputs.select(site.positions, f"site '{site}'")[0]
        return whole.index_select(at, torch.tensor(places, device=whole.device))
