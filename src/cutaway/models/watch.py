"""Watch a forward pass: read and change the activations at chosen sites, then leave without a trace.

A ``Watch`` groups what is wanted and what is done by place, puts one hook (or one handler) at each place that has
something to do, and takes everything off again on exit, also after an exception.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cutaway.core.intervention import Intervention, Where
from cutaway.core.site import KINDS, Site
from cutaway.models.attention import SoftmaxProbe, additive_mask, plain_attention
from cutaway.models.experts import gather_acts, gather_gate, run_experts, scatter_acts, scatter_gate
from cutaway.models.interface import ATTENTION, EXPERTS
from cutaway.models.plan import Anatomy, Attention, Layer, Tap
from cutaway.models.recorder import OpKey, op_name, operand_rank
from cutaway.models.region import Region, Window

Place = tuple[str, int, str]
"""(scope, layer or -1, kind): one tensor of the forward pass."""
Done = tuple[Site, Intervention]


class Stop(BaseException):
    """Raised to leave a forward pass once everything wanted was seen."""


def place_of(site: Site) -> Place:
    """The tensor that a concrete site is part of."""
    return site.scope, site.layer if KINDS[site.kind].layered else -1, site.kind


class Watch:
    """What to read (``want``) and to change (``do``) while the model runs.

    Sites are concrete (one layer each). Read ``values`` after the run.

    Args:
        root: the module that runs. anatomy: its structure.
        window: which tokens the next forward call sees; replaced per call while generating.
        attached: keep the autograd graph of what is read, and keep raw tensors so that gradients can be taken.
        device, dtype: of stored activations; None leaves them.
        stop: leave with ``Stop`` once the last layer that is wanted has run.
    """

    def __init__(
        self,
        root: nn.Module,
        anatomy: Anatomy,
        want: Iterable[Site] = (),
        do: Iterable[Done] = (),
        *,
        window: Window,
        attached: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        stop: bool = False,
    ) -> None:
        self.root, self.anatomy, self.window = root, anatomy, window
        self.attached, self.device, self.dtype, self.stop = attached, device, dtype, stop
        self.wants: dict[Place, list[Site]] = defaultdict(list)
        self.does: dict[Place, list[Done]] = defaultdict(list)
        for site in want:
            self.wants[place_of(site)].append(site)
        for site, intervention in do:
            self.does[place_of(site)].append((site, intervention))
        self.values: dict[Site, Tensor] = {}
        self.raw: dict[Site, tuple[Tensor, Callable[[Tensor], Tensor]]] = {}
        self._exits = ExitStack()
        self._modes: list[TorchFunctionMode] = []

    # -- one tensor passing by --------------------------------------------------------------------------------------
    def active(self, place: Place) -> bool:
        """Whether anything is to be read or changed there."""
        return place in self.wants or place in self.does

    def changes(self, scope: str, layer: int, *kinds: str) -> bool:
        """Whether any of these is to be changed, or its gradient taken."""
        return any((scope, layer, k) in self.does or (self.attached and (scope, layer, k) in self.wants) for k in kinds)

    def see(
        self,
        place: Place,
        raw: Tensor,
        to: Callable[[Tensor], Tensor] = lambda x: x,
        back: Callable[[Tensor], Tensor] = lambda x: x,
        *,
        clone: bool = False,
        start: int | None = None,
    ) -> Tensor:
        """The tensor that goes on: ``raw`` itself unless something changes it.

        ``to`` brings it to the site's axes and ``back`` undoes that; ``start`` is where its first position lies.
        """
        begin = self.window.start if start is None else start
        if self.attached and place in self.wants and torch.is_grad_enabled() and not raw.requires_grad:
            raw = raw.detach().requires_grad_()
        if place in self.does:
            x = to(raw)
            for site, intervention in self.does[place]:
                region = Region(site, x.shape, self.window, begin)
                if not region.empty:
                    x = region.put(x, intervention(region.get(x), Where(site, KINDS[site.kind].axes)))
            raw = back(x)
        for site in self.wants.get(place, ()):
            self._keep(site, raw, to, clone, begin)
        return raw

    def _keep(self, site: Site, raw: Tensor, to: Callable[[Tensor], Tensor], clone: bool, start: int) -> None:
        x = to(raw)
        region = Region(site, x.shape, self.window, start)
        if region.empty:
            return
        part = region.get(x)
        if self.attached:
            self.raw[site] = (raw, lambda g: region.get(to(g)))
        else:
            part = part.detach()
            if clone or (not region.whole and part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()):
                part = part.clone()  # a view would keep the whole tensor alive, or be written over
        if self.device is not None or self.dtype is not None:
            part = part.to(device=self.device or part.device, dtype=self.dtype or part.dtype)
        self.values[site] = _join(site, self.values.get(site), part) if start > self.window.start else part

    # -- on and off ---------------------------------------------------------------------------------------------------
    def __enter__(self) -> Watch:
        try:
            self._install()
        except BaseException:
            self._exits.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        while self._modes:
            self._modes.pop().__exit__(None, None, None)
        self._exits.close()

    def _install(self) -> None:
        taps: dict[Tap, list[Place]] = defaultdict(list)
        for kind, tap in self.anatomy.taps.items():
            if self.active(("", -1, kind)):
                taps[tap].append(("", -1, kind))
        attention: dict[int, Any] = {}
        experts: dict[int, Any] = {}
        owners: dict[str, Owner] = {}
        for scope, layers in self.anatomy.stacks.items():
            for i, layer in enumerate(layers):
                for kind in layer.read:
                    place = (scope, i, kind)
                    if self.active(place):
                        taps[(layer.write if self.changes(*place) else layer.read)[kind]].append(place)
                inside = [k for k in ATTENTION_KINDS if self.active((scope, i, k))]
                if inside and layer.attention is not None:
                    seer = AttentionSeer(self, scope, i, layer.attention)
                    if layer.attention.style == "interface":
                        attention[id(self.root.get_submodule(layer.attention.module))] = seer.interface
                    else:
                        self._owner(owners, layer.attention.module).attention = seer
                    if seer.chunked:
                        self._hook_pre(layer.path, seer.reset)
                if any(self.active((scope, i, k)) for k in ("expert.gate", "expert.act")):
                    experts[id(self.root.get_submodule(layer.experts))] = ExpertsSeer(self, scope, i, layer)
        for tap, places in taps.items():
            if tap.op is not None:
                self._owner(owners, tap.module).ops[tap.op].extend((place, tap.clone) for place in places)
            elif tap.where == "in":
                self._hook_in(tap, places)
            else:
                self._hook_out(tap, places)
        if self.stop:
            self._hook_stop()
        self._exits.enter_context(ATTENTION.watch(attention))
        self._exits.enter_context(EXPERTS.watch(experts))

    def _register(self, handle: Any) -> None:
        self._exits.callback(handle.remove)

    def _hook_pre(self, path: str, function: Callable[[], None]) -> None:
        self._register(self.root.get_submodule(path).register_forward_pre_hook(lambda module, args: function()))

    def _shape(self, place: Place) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
        """To the site's axes and back for tensors that lack the batch axis, or merge it with positions."""
        if place[2] == "projector":
            return (lambda x: x.reshape(-1, x.shape[-1])), (lambda x, like: x.reshape(like.shape))
        rows = 1 if place[0] else self.window.batch
        return (
            lambda x: x if x.ndim == 3 else x.reshape(rows, -1, x.shape[-1]),
            lambda x, like: x if x.ndim == like.ndim else x.reshape(like.shape),
        )

    def _pass(self, places: Sequence[Place], x: Tensor, clone: bool) -> Tensor:
        for place in places:
            to, back = self._shape(place)
            like = x
            x = self.see(place, x, to, lambda y, like=like, back=back: back(y, like), clone=clone)  # type: ignore[misc]
        return x

    def _hook_in(self, tap: Tap, places: Sequence[Place]) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            by_name = isinstance(tap.slot, str)
            x = kwargs[tap.slot] if by_name else args[tap.slot]  # type: ignore[index]
            new = self._pass(places, x, tap.clone)
            if new is x:
                return None
            if by_name:
                return args, {**kwargs, tap.slot: new}  # type: ignore[dict-item]
            return (*args[: tap.slot], new, *args[tap.slot + 1 :]), kwargs  # type: ignore[operator]

        self._register(self.root.get_submodule(tap.module).register_forward_pre_hook(hook, with_kwargs=True))

    def _hook_out(self, tap: Tap, places: Sequence[Place]) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            x = out if tap.slot is None else out[tap.slot]
            new = self._pass(places, x, tap.clone)
            if new is x:
                return None
            return new if tap.slot is None else type(out)([*out[: tap.slot], new, *out[tap.slot + 1 :]])

        # What we change must reach transformers' own capturing hooks too, so those come after ours.
        first = any(self.changes(*place) for place in places)
        self._register(self.root.get_submodule(tap.module).register_forward_hook(hook, prepend=first))

    def _hook_stop(self) -> None:
        scopes = {scope for scope, layer, _ in self.wants if layer >= 0}
        if any(layer < 0 and kind != "embed" for _, layer, kind in self.wants):
            return
        scope = "" if "" in scopes or not scopes else "vision"
        last = max((layer for s, layer, _ in self.wants if s == scope), default=0)

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            raise Stop

        self._register(
            self.root.get_submodule(self.anatomy.stacks[scope][max(last, 0)].path).register_forward_hook(leave)
        )

    # -- torch calls in a module's own forward ------------------------------------------------------------------------
    def _owner(self, owners: dict[str, Owner], path: str) -> Owner:
        if path not in owners:
            owner = owners[path] = Owner(self)
            module = self.root.get_submodule(path)
            self._register(module.register_forward_pre_hook(lambda m, a: self._push(owner)))
            self._register(module.register_forward_hook(lambda m, a, o: self._pop()))
            for child in module.modules():
                if child is not module and not isinstance(child, nn.ModuleList | nn.ModuleDict):
                    self._register(child.register_forward_pre_hook(lambda m, a: owner.shift(1)))
                    self._register(child.register_forward_hook(lambda m, a, o: owner.shift(-1)))
        return owners[path]

    def _push(self, owner: Owner) -> None:
        owner.begin()
        self._modes.append(owner)
        owner.__enter__()

    def _pop(self) -> None:
        self._modes.pop().__exit__(None, None, None)


def _join(site: Site, earlier: Tensor | None, part: Tensor) -> Tensor:
    """What the chunks of one attention saw so far: positions one after the other, patterns along the diagonal."""
    if earlier is None:
        return part
    if site.kind not in ("attn.scores", "attn.pattern"):
        return torch.cat([earlier, part], dim=1)
    q, k = earlier.shape[-2:]
    fill = -torch.inf if site.kind == "attn.scores" else 0.0
    whole = earlier.new_full((*earlier.shape[:2], q + part.shape[-2], k + part.shape[-1]), fill)
    whole[..., :q, :k], whole[..., q:, k:] = earlier, part
    return whole


class Owner(TorchFunctionMode):
    """See, and change, chosen torch calls of one module's own forward; its children are left out."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.ops: dict[OpKey, list[tuple[Place, bool]]] = defaultdict(list)
        self.attention: AttentionSeer | None = None
        self._counts: Counter[tuple[str, int]] = Counter()
        self._depth = 0

    def begin(self) -> None:
        """A new run of the module."""
        self._counts.clear()
        self._depth = 0
        if self.attention is not None:
            self.attention.reset()

    def shift(self, by: int) -> None:
        """A child begins (1) or ends (-1)."""
        self._depth += by

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self._depth:
            return func(*args, **kwargs)
        name = op_name(func)
        rank = operand_rank(args, kwargs)
        nth = self._counts[name, rank]
        if rank:
            self._counts[name, rank] += 1
        if self.attention is not None:
            out = self.attention.call(func, name, (name, rank, nth), list(args), kwargs)
        else:
            out = func(*args, **kwargs)
        for key, places in self.ops.items():
            if (key.name, key.rank, key.nth) == (name, rank, nth):
                for place, clone in places:
                    out = self.watch._pass([place], out, clone)
        return out


ATTENTION_KINDS = ("attn.q", "attn.k", "attn.v", "attn.scores", "attn.pattern", "attn.z")


class AttentionSeer:
    """Reads and changes the insides of one layer's attention, however the layer calls it."""

    def __init__(self, watch: Watch, scope: str, layer: int, attention: Attention) -> None:
        self.watch, self.scope, self.layer, self.attention = watch, scope, layer, attention
        self.chunked = bool(scope) or attention.calls > 1
        self.offset = 0

    def reset(self) -> None:
        """A new run of the layer: its calls (vision towers may attend chunk by chunk) count from the first position."""
        self.offset = 0

    def _see(self, kind: str, x: Tensor, to: Any = lambda x: x, back: Any = lambda x: x, key: bool = False) -> Tensor:
        place = (self.scope, self.layer, f"attn.{kind}")
        if not self.watch.active(place):
            return x
        start = 0 if key or self.scope else self.watch.window.start
        return self.watch.see(place, x, to, back, start=start + self.offset)

    def _swap(self, kind: str, x: Tensor, key: bool = False) -> Tensor:
        """For tensors whose heads come before positions: [batch, head, pos, d_head]."""
        return self._see(kind, x, lambda t: t.transpose(1, 2), lambda t: t.transpose(1, 2), key)

    def _wants(self, *kinds: str) -> bool:
        return any(self.watch.active((self.scope, self.layer, f"attn.{k}")) for k in kinds)

    def interface(
        self,
        native: Any,
        own: Any,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """In place of the attention function that the module looked up."""
        query, key, value = self._swap("q", query), self._swap("k", key, True), self._swap("v", value, True)
        mask = args[0] if args else kwargs.pop("attention_mask", None)
        if self._wants("scores", "pattern"):
            probe = SoftmaxProbe(key.shape[-2], lambda x: self._see("scores", x), lambda x: self._see("pattern", x))
            plain = native is own
            eager_mask = mask if plain else additive_mask(module, mask, query, key, kwargs)
            if plain or self.watch.changes(self.scope, self.layer, "attn.scores", "attn.pattern"):
                with probe:
                    out = own(module, query, key, value, eager_mask, **kwargs)
            else:
                out = native(module, query, key, value, mask, **kwargs)
                with probe:
                    own(module, query, key, value, eager_mask, **kwargs)
        else:
            out = native(module, query, key, value, mask, **kwargs)
        z = self._swap("z", out[0]) if self.attention.z_heads_first else self._see("z", out[0])
        if self.chunked:
            self.offset += query.shape[2]
        return (z, *out[1:])

    def call(
        self, func: Callable[..., Any], name: str, which: tuple[str, int, int], args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        """In place of one torch call of the attention module's own forward."""
        if self.attention.style == "sdpa":
            if name != "scaled_dot_product_attention":
                return func(*args, **kwargs)
            return self._sdpa(func, *args, **kwargs)
        keys = {key[1:]: role for role, key in self.attention.keys.items()}
        role = keys.get(which)
        if role == "softmax":
            return func(self._see("scores", args[0], *self._heads(args[0], False)), *args[1:], **kwargs)
        if role == "qk":
            return self._qk(func, args, kwargs)
        if role == "pv":
            pattern = self._see("pattern", args[0], *self._heads(args[0], False))
            value = self._see("v", args[1], *self._heads(args[1], True), key=True)
            z = func(pattern, value, *args[2:], **kwargs)
            return self._see("z", z, *self._heads(z, True))
        return func(*args, **kwargs)

    def _heads(self, like: Tensor, swap: bool) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """To [batch, pos, head, d], or [batch, head, query, key], and back; ``like`` may merge batch and heads."""
        rows, flat = self.watch.window.batch, like.ndim == 3

        def to(x: Tensor) -> Tensor:
            x = x.view(rows, -1, *x.shape[1:]) if flat else x
            return x.transpose(1, 2) if swap else x

        def back(x: Tensor) -> Tensor:
            x = x.transpose(1, 2) if swap else x
            return x.reshape(-1, *x.shape[2:]) if flat else x

        return to, back

    def _qk(self, func: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        names = [k for k in ("batch1", "batch2") if k in kwargs]
        q, k = (kwargs[n] for n in names) if names else args[-2:]
        to, back = self._heads(q, True)
        q = self._see("q", q, to, back)
        k = self._see("k", k, lambda x: to(x.transpose(-1, -2)), lambda x: back(x).transpose(-1, -2), key=True)
        if names:
            return func(*args, **{**kwargs, names[0]: q, names[1]: k})
        return func(*args[:-2], q, k, **kwargs)

    def _sdpa(self, func: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        query, key, value = self._swap("q", query), self._swap("k", key, True), self._swap("v", value, True)
        if not self._wants("scores", "pattern"):
            return self._swap("z", func(query, key, value, *args, **kwargs))
        probe = SoftmaxProbe(key.shape[-2], lambda x: self._see("scores", x), lambda x: self._see("pattern", x))
        if self.watch.changes(self.scope, self.layer, "attn.scores", "attn.pattern"):
            with probe:
                z = plain_attention(query, key, value, *args, **kwargs)
        else:
            z = func(query, key, value, *args, **kwargs)
            with probe:
                plain_attention(query, key, value, *args, **kwargs)
        return self._swap("z", z)


class ExpertsSeer:
    """Reads and changes the routing weights and the neurons of one layer's experts."""

    def __init__(self, watch: Watch, scope: str, layer: int, plan: Layer) -> None:
        self.watch, self.scope, self.layer, self.plan = watch, scope, layer, plan

    def __call__(
        self, native: Any, own: Any, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """In place of the experts function that the module looked up."""
        rows, n = self.watch.window.batch, self.plan.n_experts
        split = lambda x: x.view(rows, -1, *x.shape[1:])  # noqa: E731
        merge = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        gate_place, act_place = ((self.scope, self.layer, f"expert.{k}") for k in ("gate", "act"))
        if self.watch.active(gate_place):
            gate = scatter_gate(index, weights, n)
            seen = self.watch.see(gate_place, gate, split, merge)
            weights = gather_gate(index, seen) if self.watch.changes(*gate_place) else weights
        if not self.watch.active(act_place):
            out: Tensor = native(module, hidden, index, weights)
            return out

        def change(acts: Tensor) -> Tensor:
            full = scatter_acts(index, acts, n)
            seen = self.watch.see(act_place, full, split, merge)
            return gather_acts(index, seen)

        if self.watch.changes(*act_place):
            return run_experts(module, hidden, index, weights, change)
        out = native(module, hidden, index, weights)
        run_experts(module, hidden, index, weights, change)
        return out
