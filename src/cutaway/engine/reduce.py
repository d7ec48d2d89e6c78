"""Turn an intervention into what it changes in the residual stream.

Whatever is written at q, k, v, z, a neuron or a block's output acts on the rest of the model only through the residual
stream. So each run becomes an ``Entry``: at which layer it joins, whether before or after that layer's attention, and
what it adds there. Each step of the way (heads through the output matrix, neurons through theirs, a norm after it) is
checked on the base run itself; where the numbers do not agree the sweep is refused. Experts are the exception: what is
written there is done where the layer computes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cutaway.core.intervention import Intervention, Where
from cutaway.core.site import KINDS, Site
from cutaway.engine.base import Base, LayerCall
from cutaway.engine.rows import CannotReplayError, Reach
from cutaway.engine.script import Line
from cutaway.models.handle import Model
from cutaway.models.plan import is_transposed
from cutaway.models.region import Region, Window

INSIDE = ("attn.q", "attn.k", "attn.v")
ATTENTION = (*INSIDE, "attn.z", "attn.out")
MLP = ("mlp.act", "mlp.out")
EXPERTS = ("expert.gate", "expert.act")
"""Kinds of which a layer makes the residual stream by itself: their runs join it with all their rows."""
SUPPORTED = ("resid_pre", "resid_mid", "resid_post", *ATTENTION, *MLP, *EXPERTS)


def tolerance(dtype: torch.dtype) -> float:
    """Relative error that rounding may bring when the same sum is taken in another order."""
    return max(1e-4, 4 * torch.finfo(dtype).eps)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree within rounding of their dtype."""
    scale = float(b.abs().max())
    return float((a.float() - b.float()).abs().max()) <= tolerance(b.dtype) * max(scale, torch.finfo(b.dtype).tiny)


@dataclass(frozen=True)
class Entry:
    """Where one run joins the walk.

    Attributes:
        run: its number. intervention, site: what it does, at one concrete site.
        layer: the first layer that sees the change; the number of layers when only the readout does.
        mid: it joins after that layer's attention, whose result stays the base run's.
        positions: where it writes. first: the earliest position that it changes.
        lines: all that a run of several interventions, or one of experts, does, from ``layer`` on; the other
            attributes then say what the first of them does.
    """

    run: int
    intervention: Intervention
    site: Site
    layer: int
    mid: bool
    positions: tuple[int, ...]
    first: int
    lines: tuple[Line, ...] = ()


def wanted(model: Model, sites: Iterable[Site]) -> list[Site]:
    """The base activations that the reduction of ``sites`` needs."""
    layers = model.layers
    found: dict[Site, None] = {}
    for site in sites:
        layer = layers[site.layer]
        kinds: tuple[str, ...] = ()
        if site.kind in ATTENTION or site.kind == "resid_mid":
            kinds = ("attn.out", "mlp.out") if layer.parallel else ("attn.out", "resid_mid")
        elif site.kind in MLP:
            kinds = ("attn.out", "mlp.out", *(("mlp.act",) if site.kind == "mlp.act" else ()))
        for kind in kinds:
            if not layer.has(kind):
                raise CannotReplayError(f"layer {site.layer} has no {kind}: {layer.refused[kind]}")
            found[Site.parse(f"L{site.layer}.{kind}")] = None
    return list(found)


def entry(model: Model, reach: Reach, positions: Sequence[int], run: int, item: Intervention) -> Entry:
    """Where a run of one intervention joins; its site names one layer and one of ``SUPPORTED`` but ``EXPERTS``."""
    site = item.site
    parallel = model.layers[site.layer].parallel
    after = site.kind in (*MLP, "resid_post") or (site.kind in ATTENTION and parallel)
    mid = not after and site.kind != "resid_pre"
    first = min(reach.first[p] for p in positions)
    return Entry(run, item, site, site.layer + after, mid, tuple(positions), first)


def scripted(base: Base, run: int, items: Sequence[Intervention]) -> Entry:
    """Where a run of interventions done in place joins: with the base run's rows, at the first layer where it acts."""
    lines = tuple(Line.of(item, base.inputs) for item in items)
    first = min(base.reach.first[p] for line in lines for p in line.positions)
    site = lines[0].site
    return Entry(run, items[0], site, min(i.site.layer for i in items), False, lines[0].positions, first, lines)


class Reducer:
    """Computes what each run adds to the residual stream, from the base run."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.window = Window(base.inputs, base.inputs.real)
        self._writers: dict[tuple[int, str], Writer] = {}

    def delta(self, e: Entry) -> tuple[Tensor, Tensor]:
        """(positions [k], change [k, d_model]) of the residual stream where the run joins."""
        site, call = e.site, self.base.layers[e.site.layer]
        whole = self._value(site, call)
        region = Region(site, whole.shape, self.window)
        part = region.get(whole)
        new = e.intervention(part, Where(site, KINDS[site.kind].axes, region.real))
        wide = torch.promote_types(part.dtype, torch.float32)
        at = torch.tensor(e.positions, device=part.device)
        if site.kind in INSIDE:
            z, at = self._attend(call, site.kind, region.put(whole, new), e.first)
            base_z = call.attended.z[:, at] if call.attended else z
            return at, self.writer(site.layer, site.kind)(at, (z.to(wide) - base_z.to(wide))[0].flatten(1), None)
        change = (new.to(wide) - part.to(wide))[0]
        if site.kind in ("attn.z", "mlp.act"):
            units = None if site.index is None else site.index.resolve(whole.shape[2], "unit", f"site '{site}'")
            width = whole.shape[3] if site.kind == "attn.z" else 1
            columns = None if units is None else _columns(units, width, change.device)
            return at, self.writer(site.layer, site.kind)(at, change.flatten(1), columns)
        return at, self.writer(site.layer, site.kind)(at, change, None)

    def _value(self, site: Site, call: LayerCall) -> Tensor:
        kind = site.kind
        if kind in ("resid_pre", "resid_post"):
            return (call.pre if kind == "resid_pre" else call.post)[None]
        if kind in (*INSIDE, "attn.z") and call.attended is not None:
            seen = call.attended
            inside = {"attn.q": seen.q, "attn.k": seen.k, "attn.v": seen.v}
            return seen.z if kind == "attn.z" else inside[kind].transpose(1, 2)
        return self.base.values[site.whole()]

    def _attend(self, call: LayerCall, kind: str, new: Tensor, first: int) -> tuple[Tensor, Tensor]:
        seen = call.attended
        if seen is None:
            raise CannotReplayError("the layer did not attend")
        qkv = {"attn.q": seen.q, "attn.k": seen.k, "attn.v": seen.v} | {kind: new.transpose(1, 2)}
        at = torch.arange(first, self.base.length, device=new.device)
        return seen(qkv["attn.q"][:, :, first:], qkv["attn.k"], qkv["attn.v"], at), at

    def writer(self, layer: int, kind: str) -> Writer:
        """The checked way from what a kind writes to the residual stream."""
        inner = "attn.z" if kind in INSIDE else kind
        if (layer, inner) not in self._writers:
            self._writers[layer, inner] = self._check(layer, inner)
        return self._writers[layer, inner]

    def _check(self, layer: int, kind: str) -> Writer:
        if kind in ("resid_pre", "resid_post"):
            return Writer()
        side = "mlp" if kind in MLP else "attn"
        call, model = self.base.layers[layer], self.base.model
        out = {k: self.base.values.get(Site.parse(f"L{layer}.{k}")) for k in ("attn.out", "mlp.out", "resid_mid")}
        attn, mlp, middle = out["attn.out"], out["mlp.out"], out["resid_mid"]
        if attn is None:
            raise CannotReplayError(f"layer {layer} has no attn.out")
        if middle is not None and side == "attn":
            added, total = call.pre + attn[0], middle[0]
        else:
            added, total = call.pre + attn[0] + (0 if mlp is None else mlp[0]), call.post
        if not close(added, total):
            raise CannotReplayError(f"layer {layer} does not add its {side} output to the residual stream")
        if kind in ("attn.out", "mlp.out", "resid_mid"):
            return Writer()
        path = call.plan.w_o if side == "attn" else call.plan.w_out
        given = call.attended.z[0].flatten(1) if side == "attn" and call.attended else None
        given = self.base.values[Site.parse(f"L{layer}.mlp.act")][0] if side == "mlp" else given
        made = attn[0] if side == "attn" else mlp[0] if mlp is not None else None
        if not path or given is None or made is None:
            raise CannotReplayError(f"layer {layer} has no one matrix that writes {side} into the residual stream")
        matrix: Any = model.hf.get_submodule(path)
        with torch.no_grad():
            written: Tensor = matrix(given[None])[0]
        rows: Tensor = matrix.weight if is_transposed(matrix) else matrix.weight.T
        a, b = written.double().flatten(), made.double().flatten()
        factor = float(a @ b / (a @ a)) if bool(a.any()) else 1.0
        if abs(factor - 1) <= tolerance(made.dtype):
            factor = 1.0
        if close(written * factor, made):
            return Writer(rows.detach(), factor)
        tap = call.plan.read["attn.out" if side == "attn" else "mlp.out"]
        norm = model.hf.get_submodule(tap.module)
        if tap.where == "out" and not path.startswith(tap.module + "."):
            with torch.no_grad():
                normed = norm(written[None])[0]
            if close(normed, made):
                return Writer(rows.detach(), 1.0, norm, written)
        raise CannotReplayError(f"the way from {path} to the residual stream is not understood")


@dataclass(frozen=True)
class Writer:
    """From changes of z or of neurons [k, in] to changes of the residual stream [k, d_model].

    Attributes:
        rows: [in, d_model] the output matrix. factor: what its output is multiplied with.
        norm: what its output goes through. written: [pos, d_model] its output in the base run.
    """

    rows: Tensor | None = None
    factor: float = 1.0
    norm: nn.Module | None = None
    written: Tensor | None = None

    def __call__(self, at: Tensor, change: Tensor, columns: Tensor | None) -> Tensor:
        """``columns`` are the inputs of the matrix that ``change`` holds, at positions ``at``; None for all of them."""
        if self.rows is None:
            return change
        rows = self.rows if columns is None else self.rows[columns]
        added = change @ rows.to(change.dtype) * self.factor
        if self.norm is None or self.written is None:
            return added
        before = self.written[at]
        with torch.no_grad():
            return self.norm((before + added.to(before.dtype))[None])[0].to(added.dtype) - self.norm(before[None])[0]


def _columns(units: Sequence[int], width: int, device: torch.device) -> Tensor:
    return (torch.tensor(units, device=device)[:, None] * width + torch.arange(width, device=device)).flatten()
