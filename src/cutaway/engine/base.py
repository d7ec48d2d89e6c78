"""The base run of a sweep: what each layer was called with, and what its attention saw."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cutaway.core.inputs import Inputs
from cutaway.core.site import Site
from cutaway.engine.rows import CannotReplayError, Reach, take_rows
from cutaway.models.attention import additive_mask
from cutaway.models.front import no_cache
from cutaway.models.handle import Model
from cutaway.models.interface import ATTENTION
from cutaway.models.plan import Layer
from cutaway.models.watch import intervened

DROPPED = ("position_ids", "cache_position")
"""Arguments of attention functions that the functions used here do not read."""


@dataclass
class Attended:
    """One call of a layer's attention function in the base run.

    Attributes:
        native: the function that ran. module: the attention module.
        q, k, v: [1, head, pos, d] as the function got them.
        mask: additive, [1, 1 or head, query, key]; None when every position sees every other.
        kwargs: the function's other arguments.
        z: [1, pos, head, d_value] what came out.
        out: [1, pos, ...] what the attention module gave back.
        heads_first: the function gives [1, head, pos, d_value].
    """

    native: Any
    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    kwargs: dict[str, Any]
    z: Tensor
    out: Tensor | None = None
    heads_first: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is kept."""
        return [t for t in (self.q, self.k, self.v, self.z, self.mask, self.out) if t is not None]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        """[run, query, head, d_value] the same attention of other queries, at positions ``at``, over other keys.

        q: [run, head, query, d], k and v: [run, kv_head, key, d] from position 0 on.
        """
        kwargs = self.kwargs
        mask = None if self.mask is None else self.mask[:, :, at, : k.shape[2]]
        if mask is None and kwargs.get("is_causal") is None:
            kwargs = {**kwargs, "is_causal": False}
        out = self.native(self.module, q, k, v, mask, **kwargs)[0]
        return out.transpose(1, 2) if self.heads_first else out


class _Reached(BaseException):
    """Leaves a layer where its attention would start."""


@dataclass
class LayerCall:
    """One layer's call in the base run.

    Attributes:
        plan: its structure. module: the layer. attended: its attention.
        args, kwargs: what it was called with; the hidden states are left out (None).
        pre, post: [pos, d_model] the residual stream before and after it.
    """

    plan: Layer
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    pre: Tensor
    post: Tensor
    attended: Attended | None = None

    def run(self, x: Tensor, positions: Tensor) -> Tensor:
        """[rows, d_model] the layer applied to rows [rows, d_model] of the prompt's ``positions``."""
        length = self.pre.shape[0]
        taken = take_rows(self.args, positions, length), take_rows(self.kwargs, positions, length)
        args, kwargs = self.plan.with_stream(*taken, x[None])
        out = self.module(*args, **kwargs)
        end = self.plan.read["resid_post"].slot
        hidden: Tensor = out if end is None else out[end]
        return hidden[0]

    @property
    def seen(self) -> Attended:
        """Its attention; CannotReplayError where it did not attend."""
        if self.attended is None:
            raise CannotReplayError("a layer did not attend in the base run")
        return self.attended

    def until_attention(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [1, head, rows, d] of rows; the layer is left before it attends."""
        taken: list[tuple[Tensor, Tensor, Tensor]] = []

        def take(native: Any, own: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *a: Any, **kw: Any) -> Any:
            taken.append((q, k, v))
            raise _Reached

        with ATTENTION.watch({id(self.seen.module): take}):
            try:
                self.run(x, positions)
            except _Reached:
                return taken[0]
        raise CannotReplayError("a layer did not attend")


@dataclass
class Base:
    """The base run up to its last layer: layer calls, the activations asked for, and how far changes reach."""

    model: Model
    inputs: Inputs
    layers: list[LayerCall]
    values: dict[Site, Tensor]
    reach: Reach

    @property
    def length(self) -> int:
        """Positions of the prompt, padding included."""
        return self.inputs.ids.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of what the base run keeps."""
        kept = [t for c in self.layers for t in (c.pre, c.post, *(c.attended.tensors if c.attended else ()))]
        return sum(t.numel() * t.element_size() for t in (*kept, *self.values.values()))

    def gap(self, layer: int) -> Tensor | None:
        """[pos, d_model] what the model itself adds between this layer and the next; None when nothing.

        Some vision-language models add image features to the residual stream there.
        """
        if layer + 1 >= len(self.layers):
            return None
        gap = self.layers[layer + 1].pre - self.layers[layer].post
        return gap if bool(gap.any()) else None


def why_not(model: Model, inputs: Inputs) -> str:
    """Why replay cannot serve this model or these inputs, as far as their structure tells; "" when it can."""
    anatomy = model.anatomy(inputs)
    if len(inputs) != 1:
        return f"the inputs are {len(inputs)} rows"
    if intervened(model.hf):
        return "interventions are on around it"
    if "readout" in anatomy.refused or not anatomy.tail:
        return anatomy.refused.get("readout", "the way to the logits is not known")
    for i, layer in enumerate(anatomy.stacks[""]):
        attention = layer.attention
        if attention is None:
            return f"layer {i} has no attention that is understood"
        if attention.style != "interface":
            return f"the attention of {type(model.hf).__name__} does not go through transformers' attention interface"
        if attention.calls != 1:
            return f"layer {i} attends {attention.calls} times"
    if model.hf.training:
        return "the model is in training mode"
    return ""


def record(model: Model, inputs: Inputs, want: Iterable[Site]) -> Base:
    """The base run on ``inputs``, with the activations at ``want``.

    Raises CannotReplayError with the reason when something in it is not understood.
    """
    plans = model.anatomy(inputs).stacks[""]
    length = inputs.ids.shape[1]
    calls: dict[int, LayerCall] = {}
    attended: dict[int, Attended] = {}
    outs: dict[int, Tensor] = {}
    handlers: dict[int, Any] = {}
    with ExitStack() as exits:
        for i, plan in enumerate(plans):
            module = model.hf.get_submodule(plan.path)
            attention = model.hf.get_submodule(plan.attention.module) if plan.attention else module
            _hook(exits, module, attention, i, plan, calls, outs)
            handlers[id(attention)] = _listener(i, attended, plan)
        exits.enter_context(ATTENTION.watch(handlers))
        end = Site.parse(f"L{len(plans) - 1}.resid_post")
        trace = model.trace(inputs, want=[*want, end], stop=True)
    if len(calls) < len(plans) or len(attended) < len(plans):
        raise CannotReplayError("not every layer ran")
    for i, call in calls.items():
        call.attended = attended[i]
        attended[i].out = outs[i]
        if call.pre.ndim != 2 or call.pre.shape[0] != length or attended[i].k.shape[-2] != length:
            raise CannotReplayError(f"layer {i} does not run over the {length} positions of the prompt")
    reach = Reach.of(length, (_visible(a.mask) for a in attended.values()))
    first = torch.zeros(1, dtype=torch.long, device=model.device)
    for call in calls.values():
        take_rows(call.args, first, length)
        take_rows(call.kwargs, first, length)
    return Base(model, inputs, [calls[i] for i in range(len(plans))], dict(trace.items()), reach)


def _hook(
    exits: ExitStack,
    module: nn.Module,
    attention: nn.Module,
    i: int,
    plan: Layer,
    calls: dict[int, LayerCall],
    outs: dict[int, Tensor],
) -> None:
    slot, end = plan.read["resid_pre"].slot, plan.read["resid_post"].slot

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if i in calls:
            raise CannotReplayError(f"layer {i} ran twice in one forward pass")
        if isinstance(slot, str):
            x, kept, named = kwargs[slot], args, {k: v for k, v in kwargs.items() if k != slot}
        else:
            x, named = args[slot or 0], dict(kwargs)
            kept = (*args[: slot or 0], None, *args[(slot or 0) + 1 :])
        pre = x.detach()[0].clone()
        kept, named = tuple(map(no_cache, kept)), {k: no_cache(v) for k, v in named.items()}
        calls[i] = LayerCall(plan, module, kept, named, pre, pre)

    def after(_: nn.Module, args: Any, out: Any) -> None:
        hidden = out if end is None else out[end]
        calls[i].post = hidden.detach()[0].clone()

    def seen(_: nn.Module, args: Any, out: Any) -> None:
        x = out if isinstance(out, Tensor) else out[0]
        outs[i] = x.detach()

    exits.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    exits.callback(module.register_forward_hook(after).remove)
    exits.callback(attention.register_forward_hook(seen).remove)


def _listener(i: int, attended: dict[int, Attended], plan: Layer) -> Any:
    heads_first = plan.attention is not None and plan.attention.z_heads_first

    def listen(native: Any, own: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kw: Any) -> Any:
        out = native(module, q, k, v, *args, **kw)
        others = dict(kw)
        mask = args[0] if args else others.pop("attention_mask", None)
        if len(args) > 1:
            raise CannotReplayError(f"the attention of layer {i} takes {len(args)} arguments by position")
        if native is not own and getattr(native, "__name__", "") != "sdpa_attention_forward":
            raise CannotReplayError(f"the attention implementation of layer {i} is neither eager nor sdpa")
        if mask is not None or native is not own:
            mask = additive_mask(module, mask, q, k, kw)
        if mask is not None and mask.shape[-2:] != (q.shape[-2], k.shape[-2]):
            raise CannotReplayError(f"the mask of layer {i} has shape {list(mask.shape)}")
        others = {name: value for name, value in others.items() if name not in DROPPED}
        for name, value in others.items():
            if isinstance(value, Tensor) and q.shape[-2] in value.shape:
                raise CannotReplayError(f"the attention argument {name!r} of shape {list(value.shape)}")
        z = out[0].transpose(1, 2) if heads_first else out[0]
        attended[i] = Attended(
            native, module, q.detach(), k.detach(), v.detach(), mask, others, z.detach(), heads_first=heads_first
        )
        return out

    return listen


def _visible(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else (mask[0] > torch.finfo(mask.dtype).min / 2).any(dim=0).cpu()
