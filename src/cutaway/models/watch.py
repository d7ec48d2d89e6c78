"""Watch a forward pass: read and change the activations at chosen sites, then leave without a trace.

A ``Watch`` groups what is wanted and what is done by place, puts one hook (or one handler) at each place that has
something to do, and takes everything off again on exit, also after an exception. It serves the thread that opened it.
A watch opened inside another on the same module takes its interventions over and does them first.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cutaway.core.intervention import Intervention, Where
from cutaway.core.site import KINDS, Site
from cutaway.models.attention import Change, same
from cutaway.models.interface import ATTENTION, EXPERTS
from cutaway.models.plan import Anatomy, Tap
from cutaway.models.recorder import remade
from cutaway.models.region import Region, Window, joined
from cutaway.models.seers import ATTENTION_KINDS, AttentionSeer, ExpertsSeer, Owner

Place = tuple[str, int, str]
"""(scope, layer or -1, kind): one tensor of the forward pass."""


class Done(NamedTuple):
    """One intervention at one concrete site; ``growing`` when positions that are not there are no error."""

    site: Site
    intervention: Intervention
    growing: bool = False


class Stop(BaseException):
    """Raised to leave a forward pass once everything wanted was seen."""


def place_of(site: Site) -> Place:
    """The tensor that a concrete site is part of."""
    return site.scope, site.layer if KINDS[site.kind].layered else -1, site.kind


_open: dict[tuple[int, int], list[Watch]] = defaultdict(list)
"""Watches that are on, outermost first, by thread and root module."""


@contextmanager
def asleep(root: nn.Module) -> Iterator[None]:
    """While open, what watches ``root`` in this thread neither reads nor changes anything."""
    on = [watch for watch in _open.get((threading.get_ident(), id(root)), ()) if watch.awake]
    for watch in on:
        watch.awake = False
    try:
        yield
    finally:
        for watch in on:
            watch.awake = True


def intervened(root: nn.Module) -> bool:
    """Whether interventions are on around ``root`` in this thread."""
    return any(watch.does for watch in _open.get((threading.get_ident(), id(root)), ()))


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
        for done in do:
            self.does[place_of(done.site)].append(done)
        self.values: dict[Site, Tensor] = {}
        self.raw: dict[Site, list[tuple[Tensor, Callable[[Tensor], Tensor]]]] = {}
        self.awake = True
        self.modes: list[TorchFunctionMode] = []
        self._exits = ExitStack()
        self._key = (threading.get_ident(), id(root))

    def active(self, place: Place) -> bool:
        """Whether anything is to be read or changed there."""
        return place in self.wants or place in self.does

    def changes(self, scope: str, layer: int, *kinds: str) -> bool:
        """Whether any of these is to be changed, or its gradient taken."""
        return any((scope, layer, k) in self.does or (self.attached and (scope, layer, k) in self.wants) for k in kinds)

    def on(self) -> bool:
        """Whether this call is for us: in our thread, and no watch inside us has taken over."""
        return self.awake and threading.get_ident() == self._key[0]

    def see(
        self,
        place: Place,
        raw: Tensor,
        to: Change = same,
        back: Change = same,
        *,
        clone: bool = False,
        start: int | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """The tensor that goes on: ``raw`` itself unless something changes it.

        ``to`` brings it to the site's axes and ``back`` undoes that; ``start`` is where its first position lies;
        ``clone`` says that later calls write over it, ``chunk`` where it starts when it comes in several parts.
        """
        raw = self.change(place, raw, to, back, clone=clone, start=start, chunk=chunk)
        return self.read(place, raw, to, clone=clone, start=start)

    def change(
        self,
        place: Place,
        raw: Tensor,
        to: Change = same,
        back: Change = same,
        *,
        clone: bool = False,
        start: int | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """``raw`` after the interventions at a place; a tensor that can bear a gradient where one is asked for."""
        if self.attached and place in self.wants and torch.is_grad_enabled():
            raw = self._alias(raw, clone)
        if place not in self.does:
            return raw
        begin = self.window.start if start is None else start
        x = to(raw)
        for done in self.does[place]:
            window = self.window.lenient() if done.growing else self.window
            region = Region(done.site, x.shape, window, begin)
            if not region.empty:
                where = Where(done.site, KINDS[done.site.kind].axes, region.real, chunk)
                x = region.put(x, self._changed(done.intervention, region.get(x), where))
        new = back(x)
        return new.clone() if clone else new

    @staticmethod
    def _alias(raw: Tensor, clone: bool) -> Tensor:
        """A tensor of our own for what goes on from here: others that read ``raw`` have no part in its gradient."""
        if not raw.requires_grad:
            return (raw.detach().clone() if clone else raw.detach()).requires_grad_()
        return raw.clone() if clone else raw.view_as(raw)

    def _changed(self, intervention: Intervention, x: Tensor, where: Where) -> Tensor:
        with asleep(self.root):  # an intervention that runs the model itself runs it bare
            return intervention(x, where)

    def read(
        self,
        place: Place,
        raw: Tensor,
        to: Change = same,
        *,
        clone: bool = False,
        start: int | None = None,
    ) -> Tensor:
        """Keep what is wanted at a place; gives ``raw``, or a copy where keeping its graph needs it."""
        if place not in self.wants:
            return raw
        for site in self.wants[place]:
            self._keep(site, raw, to, clone, self.window.start if start is None else start)
        return raw.clone() if clone and self.attached else raw

    def _keep(self, site: Site, raw: Tensor, to: Callable[[Tensor], Tensor], clone: bool, start: int) -> None:
        x = to(raw)
        region = Region(site, x.shape, self.window, start)
        if region.empty:
            return
        part, more = region.get(x), start > self.window.start
        if self.attached:
            earlier = self.raw.get(site, []) if more else []
            self.raw[site] = [*earlier, (raw, lambda g: region.get(to(g)))]
        else:
            part = part.detach()
            if clone or (not region.whole and part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()):
                part = part.clone()  # a view would keep the whole tensor alive, or be written over
        if self.device is not None or self.dtype is not None:
            part = part.to(device=self.device or part.device, dtype=self.dtype or part.dtype)
        self.values[site] = joined(site, self.values.get(site), part) if more else part

    def gradients(self, of: Tensor) -> dict[Site, Tensor]:
        """The gradient of a number at each site; 0 where it does not depend on it."""
        parts = [(site, raw, to) for site, seen in self.raw.items() for raw, to in seen]
        found = torch.autograd.grad(of, [raw for _, raw, _ in parts], allow_unused=True)
        grads: dict[Site, Tensor] = {}
        for (site, raw, to), g in zip(parts, found, strict=True):
            grads[site] = joined(site, grads.get(site), to(torch.zeros_like(raw) if g is None else g).detach(), 0.0)
        return grads

    def __enter__(self) -> Watch:
        self._key = (threading.get_ident(), id(self.root))
        try:
            self._take_over()
            self._install()
        except BaseException:
            self._exits.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        while self.modes:
            self.modes.pop().__exit__(None, None, None)
        self._exits.close()

    def _take_over(self) -> None:
        """Do what the watch around this one does, before our own, and let it sleep meanwhile."""
        around = _open[self._key]
        if around and around[-1].awake:
            for place, others in around[-1].does.items():
                self.does[place][:0] = [done._replace(growing=True) for done in others]
        self._exits.enter_context(asleep(self.root))
        around.append(self)
        self._exits.callback(self._closed)

    def _closed(self) -> None:
        _open[self._key].remove(self)
        if not _open[self._key]:
            del _open[self._key]

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
                        self._before(self.root.get_submodule(layer.path), lambda _, __, seer=seer: seer.reset())
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

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """``hook(args, kwargs)`` before the module runs."""

        # Another thread may be about to call a hook that is being taken off, by then without keywords.
        def ours(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            return hook(args, kwargs) if self.on() else None

        self._exits.callback(module.register_forward_pre_hook(ours, with_kwargs=True).remove)

    def _after(
        self, module: nn.Module, hook: Callable[[Any], Any], *, first: bool = False, always: bool = False
    ) -> None:
        """``hook(output)`` after the module ran; ``always`` also when it failed."""

        def ours(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            return hook(out) if self.on() else None

        self._exits.callback(module.register_forward_hook(ours, prepend=first, always_call=always).remove)

    def _shape(self, place: Place) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
        """To the site's axes and back for tensors that lack the batch axis, or merge it with positions."""
        if place[2] == "projector":
            return (lambda x: x.reshape(-1, x.shape[-1])), (lambda x, like: x.reshape(like.shape))
        rows = 1 if place[0] else self.window.batch
        return (
            lambda x: x if x.ndim == 3 else x.reshape(rows, -1, x.shape[-1]),
            lambda x, like: x if x.ndim == like.ndim else x.reshape(like.shape),
        )

    def changed(self, places: Sequence[Place], x: Tensor, clone: bool) -> Tensor:
        """``x`` after what is done at these places, which share a tap."""
        for place in places:
            to, back = self._shape(place)
            x = self.change(place, x, to, lambda y, like=x, back=back: back(y, like), clone=clone)  # type: ignore[misc]
        return x

    def kept(self, places: Sequence[Place], x: Tensor, clone: bool) -> Tensor:
        """``x``, after what is wanted of it was kept."""
        for place in places:
            x = self.read(place, x, self._shape(place)[0], clone=clone)
        return x

    def passed(self, places: Sequence[Place], x: Tensor, clone: bool) -> Tensor:
        """``x`` after it was changed, then kept."""
        return self.kept(places, self.changed(places, x, clone), clone)

    def _hook_in(self, tap: Tap, places: Sequence[Place]) -> None:
        slot = tap.slot

        def hook(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if isinstance(slot, str):
                new = self.passed(places, kwargs[slot], tap.clone)
                named: dict[str, Any] = {**kwargs, slot: new}
                return None if new is kwargs[slot] else (args, named)
            at = slot or 0
            new = self.passed(places, args[at], tap.clone)
            return None if new is args[at] else ((*args[:at], new, *args[at + 1 :]), kwargs)

        self._before(self.root.get_submodule(tap.module), hook)

    def _hook_out(self, tap: Tap, places: Sequence[Place]) -> None:
        slot = tap.slot

        def replaced(out: Any, do: Callable[[Sequence[Place], Tensor, bool], Tensor]) -> Any:
            x = out[slot] if isinstance(slot, int) else out
            new = do(places, x, tap.clone)
            if new is x:
                return None
            return remade(out, [*out[:slot], new, *out[slot + 1 :]]) if isinstance(slot, int) else new

        module = self.root.get_submodule(tap.module)
        # What we change must reach the hooks that are there already, transformers' capturing ones among them; what we
        # keep is what those hooks leave.
        if any(self.changes(*place) for place in places):
            self._after(module, lambda out: replaced(out, self.changed), first=True)
        if any(place in self.wants for place in places):
            self._after(module, lambda out: replaced(out, self.kept))

    def _hook_stop(self) -> None:
        scopes = {scope for scope, layer, _ in self.wants if layer >= 0}
        if any(layer < 0 and kind != "embed" for _, layer, kind in self.wants):
            return
        scope = "" if "" in scopes or not scopes else "vision"
        last = max((layer for s, layer, _ in self.wants if s == scope), default=0)

        def leave(out: Any) -> None:
            raise Stop

        self._after(self.root.get_submodule(self.anatomy.stacks[scope][max(last, 0)].path), leave)

    def _owner(self, owners: dict[str, Owner], path: str) -> Owner:
        if path not in owners:
            owner = owners[path] = Owner(self)
            module = self.root.get_submodule(path)
            self._before(module, lambda args, kwargs: self._push(owner))
            self._after(module, lambda out: self._pop(), always=True)
            for child in module.modules():
                if child is not module and not isinstance(child, nn.ModuleList | nn.ModuleDict):
                    self._before(child, lambda args, kwargs: owner.shift(1))
                    self._after(child, lambda out: owner.shift(-1), always=True)
        return owners[path]

    def _push(self, owner: Owner) -> None:
        owner.begin()
        self.modes.append(owner)
        owner.__enter__()

    def _pop(self) -> None:
        if self.modes:
            self.modes.pop().__exit__(None, None, None)
