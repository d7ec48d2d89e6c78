"""What a layer would make of another residual stream: it is called, and left where it attends or has attended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cutaway.core.errors import UnsupportedError
from cutaway.core.intervention import Apply, Where
from cutaway.core.site import Items, Site
from cutaway.models.plan import Anatomy
from cutaway.models.region import Window
from cutaway.models.watch import Done, Stop, Watch, asleep

SIDES = ("q", "k", "v")


@torch.no_grad()
def until_attention(
    root: nn.Module, anatomy: Anatomy, layer: int, args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor
) -> dict[str, Tensor]:
    """{"q", "k", "v"}: [row, pos, head, d] of a layer that is called as the model called it, but with ``x``.

    Args:
        args, kwargs: what the model called the layer with. x: [row, pos, d_model] in place of the residual stream.

    Raises:
        UnsupportedError: the layer did not attend.
    """
    seen: dict[str, Tensor] = {}

    def take(part: Tensor, where: Where) -> Tensor:
        seen[where.site.kind[-1]] = part
        if len(seen) == len(SIDES):
            raise Stop
        return part

    do = {f"attn.{side}": take for side in SIDES}
    if not _left(root, anatomy, layer, args, kwargs, x, do):
        raise UnsupportedError(f"the queries, keys and values of layer {layer}", "it did not attend", "")
    return seen


@torch.no_grad()
def behind_attention(
    root: nn.Module, anatomy: Anatomy, layer: int, args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, z: Tensor
) -> Tensor:
    """[row, pos, head, d_value] what the output matrix of a layer reads that is called so and whose heads gave ``z``.

    Args:
        args, kwargs, x: as in ``until_attention``. z: [row, pos, head, d_value].

    Raises:
        UnsupportedError: the matrix did not run.
    """
    seen: list[Tensor] = []

    def take(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0].reshape(z.shape))
        raise Stop

    handle = root.get_submodule(anatomy.stacks[""][layer].w_o).register_forward_pre_hook(take, prepend=True)
    try:
        _left(root, anatomy, layer, args, kwargs, x, {"attn.z": lambda _, where: z})
    finally:
        handle.remove()
    if not seen:
        raise UnsupportedError(f"what the output matrix of layer {layer} reads", "it did not run", "")
    return seen[0]


def _left(
    root: nn.Module,
    anatomy: Anatomy,
    layer: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    x: Tensor,
    do: Mapping[str, Callable[[Tensor, Where], Tensor]],
) -> bool:
    """Whether calling the layer, with these functions at its sites, was left on the way."""
    plan = anatomy.stacks[""][layer]
    given, named = plan.with_stream(tuple(map(no_cache, args)), {k: no_cache(v) for k, v in kwargs.items()}, x)
    done = [Done(Site(kind, Items.of(layer)), Apply(f"L{layer}.{kind}", f), True) for kind, f in do.items()]
    window = Window(None, [list(range(x.shape[1]))] * len(x), growing=True)
    with asleep(root), Watch(root, anatomy, do=done, window=window):
        try:
            root.get_submodule(plan.path)(*given, **named)
        except Stop:
            return True
    return False


def no_cache(value: Any) -> Any:
    """None for the fresh key-value cache that some models make for every pass: whoever calls again brings all keys."""
    return None if hasattr(value, "get_seq_length") else value
