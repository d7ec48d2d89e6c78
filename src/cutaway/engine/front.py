"""What a layer's attention and MLP make of residual streams that differ from the base run's, for many at once.

The layer itself is called on all rows, up to where its attention would start; what lies before that treats each row
alone. For the MLP the attention's output stays what it was in the base run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cutaway.core.site import Items, Site
from cutaway.engine.base import Attended, Base
from cutaway.engine.rows import CannotReplayError
from cutaway.engine.walk import freezing
from cutaway.models.interface import ATTENTION
from cutaway.models.region import Window
from cutaway.models.watch import Watch

ROWS = 2048
"""Rows that go through at once."""


@torch.no_grad()
def attention_inputs(base: Base, layer: int, streams: Tensor) -> dict[str, Tensor]:
    """{"attn.q": [run, pos, head, d_head], ...} of residual streams [run, pos, d_model] entering a layer."""
    call = base.layers[layer]
    found: dict[str, list[Tensor]] = {"attn.q": [], "attn.k": [], "attn.v": []}
    for some in streams.split(max(1, ROWS // base.length)):
        made = call.until_attention(some.flatten(0, 1), _positions(some))
        for kept, x in zip(found.values(), made, strict=True):
            kept.append(x[0].unflatten(1, (-1, base.length)).permute(1, 2, 0, 3))
    return {kind: torch.cat(parts) for kind, parts in found.items()}


@torch.no_grad()
def mlp_outputs(base: Base, layer: int, streams: Tensor) -> Tensor:
    """[run, pos, d_model] what the MLP adds where the residual stream entering its layer is one of ``streams``.

    streams: [run, pos, d_model]; the layer's attention adds what it added in the base run.
    """
    call, seen = base.layers[layer], base.layers[layer].seen
    if seen.out is None:
        raise CannotReplayError(f"the attention of layer {layer} gave nothing")
    site = Site("mlp.out", Items.of(layer))
    parts = []
    for some in streams.split(max(1, ROWS // base.length)):
        at = _positions(some)
        window = Window(None, [list(range(len(at)))], growing=True)
        watch = Watch(base.model.hf, base.model.anatomy(base.inputs), [site], window=window)
        with watch, ATTENTION.watch({id(seen.module): _idle(seen)}), freezing(seen.module, 0, seen.out[0, at]):
            call.run(some.flatten(0, 1), at)
        parts.append(watch.values[site][0].unflatten(0, (-1, base.length)))
    return torch.cat(parts)


def _idle(seen: Attended) -> Any:
    def answer(native: Any, own: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *a: Any, **kw: Any) -> Any:
        z = seen.z[:, : q.shape[2]]
        return (z.transpose(1, 2) if seen.heads_first else z), None

    return answer


def _positions(streams: Tensor) -> Tensor:
    return torch.arange(streams.shape[1], device=streams.device).repeat(streams.shape[0])
