"""One forward pass taken apart: what every layer, head, source position and neuron adds at the positions that are read.

    x_L[t] = x_0[t] + sum of all vectors + sum of the constants (biases, shifts of norms)

A ``Group`` holds the elements of one kind in one layer without making their vectors: rows of the output matrix, and the
numbers they are multiplied with.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from cutaway.core.errors import UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.site import Items
from cutaway.core.trace import Trace
from cutaway.ops.units import Unit
from cutaway.ops.watched import WatchedModel, rounding
from cutaway.ops.writers import Writer, expert_rows, rows_of, writer

Level = Literal["layer", "head", "head-position", "neuron", "attention-neuron"]
ATTENTION_LEVELS = ("head", "head-position", "attention-neuron")


@dataclass(frozen=True)
class Group:
    """Elements of one kind in one layer.

    Attributes:
        layer: its number. kind: of the site they are part of. writer: how their vectors reach the residual stream.
        rows: [m, d]; element j of a source joins the ``width`` rows from ``j * width`` on.
        coef: [R, source, m] what each row is multiplied with.
        expert: of which expert they are; -1 for none.
        by_source: the sources are positions of the prompt, not one sum over them.
    """

    layer: int
    kind: str
    writer: Writer
    rows: Tensor
    coef: Tensor
    width: int = 1
    expert: int = -1
    channels: int = 0
    by_source: bool = False

    def __len__(self) -> int:
        return self.coef.shape[1] * self.per_source

    @property
    def per_source(self) -> int:
        """Elements of one source."""
        return self.rows.shape[0] // self.width

    def first_order(self, g: Tensor) -> Tensor:
        """[n] inner products, summed over R, of every element's vector with a gradient [R, d]."""
        dots = self.writer.pull(g) @ self.rows.float().T
        product = (self.coef.float() * dots[:, None, :]).sum(0)
        return product.unflatten(-1, (-1, self.width)).sum(-1).flatten()

    def by_position(self, g: Tensor) -> Tensor:
        """[R, n] the same inner products, not summed."""
        product = self.coef.float() * (self.writer.pull(g) @ self.rows.float().T)[:, None, :]
        return product.unflatten(-1, (-1, self.width)).sum(-1).flatten(1)

    def vectors(self, index: Tensor) -> Tensor:
        """[b, R, d] what the elements at ``index`` [b] add to the residual stream."""
        source, j = index // self.per_source, index % self.per_source
        if self.width == 1:
            raw = self.rows[j].float()[:, None] * self.coef[:, source, j].float().T[..., None]
        else:
            rows = self.rows.unflatten(0, (-1, self.width))[j].float()
            coef = self.coef.unflatten(-1, (-1, self.width))[:, source, j].float()
            raw = torch.einsum("rbc,bcd->brd", coef, rows)
        return self.writer(raw)

    def unit(self, element: int) -> Unit:
        """The place of an element."""
        source, j = divmod(element, self.per_source)
        at = source if self.by_source else -1
        if self.kind == "attn.z":
            head, channel = (j, -1) if self.width > 1 else divmod(j, self.channels)
            return Unit(self.kind, self.layer, head, channel, at)
        if self.expert >= 0:
            return Unit(self.kind, self.layer, self.expert, j, -1)
        return Unit(self.kind, self.layer, j, -1, -1)

    def coefficient(self, element: int) -> float:
        """What one row is multiplied with at the first position read; NaN for elements of several rows."""
        source, j = divmod(element, self.per_source)
        return float(self.coef[0, source, j]) if self.width == 1 else float("nan")

    def element(self, unit: Unit) -> int:
        """The index of a unit of this group."""
        j = unit.inner if self.expert >= 0 else unit.number
        j = j * self.channels + unit.inner if self.kind == "attn.z" and self.width == 1 else j
        return max(unit.source, 0) * self.per_source + j


@dataclass(frozen=True)
class LayerParts:
    """One layer at the R positions read.

    Attributes:
        x: [R, d] the residual stream before it. attn, mlp: [R, d] what its parts add; None where it has none.
        before_mlp: [R, d] the state that the MLP reads: x + attn, or x in parallel blocks.
        inserted: [R, d] what of x the model added behind the layer before (image features); None where it adds nothing.
    """

    x: Tensor
    attn: Tensor | None
    mlp: Tensor | None
    before_mlp: Tensor
    parallel: bool
    inserted: Tensor | None = None


@dataclass(frozen=True)
class Parts:
    """A forward pass taken apart.

    Attributes:
        model: whose run it is. inputs: what was run, with teacher-forced tokens. reads: the R padded positions.
        layers: by number. final: [R, d] the last residual stream.
        groups: the elements that were asked for.
        missing: why a layer's elements could not be told, by layer.
        unnamed: share of a layer's output that its elements and constants do not hold (shared experts), by layer.
        gates: [pos, head, channel] what z is multiplied with before its output matrix, by layer that has gates; where
            ``attn.z`` was kept at all positions.
        trace: every activation that was kept.
    """

    model: WatchedModel
    inputs: Inputs
    reads: tuple[int, ...]
    layers: tuple[LayerParts, ...]
    final: Tensor
    groups: tuple[Group, ...]
    missing: dict[int, str] = field(default_factory=dict)
    unnamed: dict[int, float] = field(default_factory=dict)
    trace: Trace | None = None
    gates: dict[int, Tensor] = field(default_factory=dict)

    @cached_property
    def logits(self) -> Tensor:
        """[R, vocab] the model's own, of the last states; no other position is unembedded."""
        return self.model.unembed(self.final).float()

    @property
    def identity_error(self) -> float:
        """Largest gap between a layer's sum and the stream after it, relative to the stream."""
        after = [layer.x if layer.inserted is None else layer.x - layer.inserted for layer in self.layers[1:]]
        after.append(self.final)
        gaps = [
            float((sum((p for p in (a.attn, a.mlp) if p is not None), a.x) - b).abs().max() / b.abs().max())
            for a, b in zip(self.layers, after, strict=True)
        ]
        return max(gaps)


def unpadded(inputs: Inputs) -> Inputs:
    """One prompt without its padding, so that positions count its tokens."""
    return inputs.row(0) if inputs.padded else inputs


def take_apart(
    model: WatchedModel, inputs: Inputs, reads: int | Sequence[int], level: Level, extra: Sequence[str] = ()
) -> Parts:
    """The parts of a run of one prompt.

    Args:
        reads: how many of its last positions are read, or which ones, counting its tokens from 0.
        extra: further sites to keep in ``trace``.

    Raises:
        UnsupportedError: a layer does not add its parts to the residual stream.
    """
    places = range(-reads, 0) if isinstance(reads, int) else reads
    at = f"@{Items.of(places)}"
    plans = model.anatomy(inputs).stacks[""]  # with an image, a model may show more of itself
    n = len(plans)
    want = [*extra, f"L{n - 1}.resid_post{at}"]
    for i, plan in enumerate(plans):
        sides = [s for s in ("attn.out", "mlp.out") if plan.has(s)]
        if len(sides) != max(1, plan.terms) or not plan.has("resid_pre") or plan.norms:
            why = next(iter(plan.norms and ["it norms the sum of stream and part"]), "")
            why = why or plan.refused.get("attn.out") or plan.refused.get("mlp.out", "")
            raise UnsupportedError(f"what layer {i} of {model.name} adds", why, "read its sites instead")
        if plan.between:
            found = f"{plan.between} adds to the stream in front of it"
            raise UnsupportedError(f"what enters layer {i} of {model.name}", found, "read its sites instead")
        want += [f"L{i}.{kind}{at}" for kind in ("resid_pre", *sides)]
        want += [f"L{i - 1}.resid_post{at}"] if plan.inserted else []
        if level in ATTENTION_LEVELS and plan.has("attn.z") and plan.w_o:
            want += [f"L{i}.attn.z{at}"] if level == "head" else [f"L{i}.attn.pattern{at}", f"L{i}.attn.v"]
            want += [f"L{i}.attn.z"] if plan.gated else []
        if level == "neuron":
            want += [f"L{i}.mlp.act{at}"] if plan.has("mlp.act") else []
            want += [f"L{i}.expert.gate{at}", f"L{i}.expert.act{at}"] if plan.has("expert.act") else []
    experts: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}
    with ExitStack() as exits:
        if level == "neuron":
            _listen_to_experts(model, exits, experts)
        _listen_to_gates(model, exits, [i for i in range(n) if f"L{i}.attn.z" in want], written)
        trace = model.trace(inputs, want=want, stop=True)
    reads = tuple(inputs.real[0][p] for p in places)
    by_name = {str(site): value[0] for site, value in trace.items()}
    layers = tuple(_layer(plan, i, by_name, at) for i, plan in enumerate(plans))
    gates = {i: _over(u, by_name[f"L{i}.attn.z"]) for i, u in written.items()}
    groups: list[Group] = []
    missing: dict[int, str] = {}
    unnamed: dict[int, float] = {}
    for i, plan in enumerate(plans):
        try:
            if level in ATTENTION_LEVELS and plan.has("attn.z") and plan.w_o:
                if level != "head":
                    refuse_other_keys(i, by_name[f"L{i}.attn.v"].shape[0], inputs.ids.shape[1])
                groups.append(_attention(model, i, plan, layers[i], by_name, at, level, gates.get(i), reads))
            elif level in ATTENTION_LEVELS and plan.has("attn.out"):
                missing[i] = plan.refused.get("attn.z", "its heads are not written by one matrix")
            elif level == "neuron" and plan.has("mlp.act"):
                groups.append(_neurons(model, i, layers[i], by_name, at))
            elif level == "neuron" and plan.has("expert.act"):
                some, unnamed[i] = _experts(model, i, layers[i], by_name, at, experts.get(i), reads)
                groups += some
            elif level == "neuron" and plan.has("mlp.out"):
                missing[i] = plan.refused.get("mlp.act", "")
        except UnsupportedError as error:
            missing[i] = error.found
    final = by_name[f"L{n - 1}.resid_post{at}"].float()
    return Parts(model, inputs, reads, layers, final, tuple(groups), missing, unnamed, trace, gates)


def refuse_other_keys(layer: int, keys: int, positions: int) -> None:
    """UnsupportedError where a layer attends to something else than the positions of the prompt."""
    if keys != positions:
        found = f"it attends to {keys} keys, which are not the prompt's {positions} positions"
        raise UnsupportedError(f"attention of layer {layer}", found, "")


def _layer(plan: Any, i: int, values: dict[str, Tensor], at: str) -> LayerParts:
    x = values[f"L{i}.resid_pre{at}"].float()
    attn, mlp = (values.get(f"L{i}.{side}.out{at}") for side in ("attn", "mlp"))
    attn, mlp = (None if part is None else part.float() for part in (attn, mlp))
    before = x if plan.parallel or attn is None else x + attn
    inserted = x - values[f"L{i - 1}.resid_post{at}"].float() if plan.inserted else None
    return LayerParts(x, attn, mlp, before, plan.parallel, inserted)


def _attention(
    model: WatchedModel,
    i: int,
    plan: Any,
    parts: LayerParts,
    values: dict[str, Tensor],
    at: str,
    level: Level,
    gates: Tensor | None,
    reads: Sequence[int],
) -> Group:
    rows, bias = rows_of(model, plan.w_o)
    channels: int = plan.attention.d_value
    if level == "head":
        coef = values[f"L{i}.attn.z{at}"].flatten(1)[:, None]
    else:
        pattern, v = values[f"L{i}.attn.pattern{at}"], values[f"L{i}.attn.v"]
        shared = pattern.shape[0] // v.shape[1]
        v = v.repeat_interleave(shared, dim=1) if shared > 1 else v
        coef = torch.einsum("hrp,phc->rphc", pattern.to(v.dtype), v).flatten(2)
    if parts.attn is None:
        raise UnsupportedError(f"attention of layer {i}", "what it adds is not seen", "")
    if gates is not None:
        gate = gates[list(reads)].flatten(1)
        if len(reads) == 1:  # the rows of this one position: who carries other vectors through them meets the gate too
            rows = rows.float() * gate[0][:, None]
        else:
            coef = coef.float() * gate[:, None]
    total = coef.float().sum(1) @ rows.float()
    how = writer(model, i, "attn", total, bias, parts.attn)
    width = 1 if level == "attention-neuron" else channels
    return Group(i, "attn.z", how, rows, coef, width, channels=channels, by_source=level != "head")


def _neurons(model: WatchedModel, i: int, parts: LayerParts, values: dict[str, Tensor], at: str) -> Group:
    rows, bias = rows_of(model, model.layers[i].w_out)
    coef = values[f"L{i}.mlp.act{at}"]
    if parts.mlp is None:
        raise UnsupportedError(f"MLP of layer {i}", "what it adds is not seen", "")
    total = coef @ rows if rows.dtype == torch.float32 else coef.float() @ rows.float()
    return Group(i, "mlp.act", writer(model, i, "mlp", total, bias, parts.mlp), rows, coef[:, None])


def _experts(
    model: WatchedModel,
    i: int,
    parts: LayerParts,
    values: dict[str, Tensor],
    at: str,
    out: Tensor | None,
    reads: Sequence[int],
) -> tuple[list[Group], float]:
    """Groups of the experts that were routed to, and the share of the MLP's output that is not theirs."""
    gate, act = values[f"L{i}.expert.gate{at}"], values[f"L{i}.expert.act{at}"]
    rows = expert_rows(model, i)
    coef = gate[..., None] * act
    routed = [e for e in range(gate.shape[1]) if bool(gate[:, e].any())]
    total = torch.stack([coef[:, e].float() @ rows[e].float() for e in routed]).sum(0)
    module: Any = model.hf.get_submodule(model.layers[i].experts)
    bias = getattr(module, "down_proj_bias", None)
    biases = None if bias is None else gate.float() @ bias.detach().float()
    if parts.mlp is None or out is None:
        raise UnsupportedError(f"experts of layer {i}", "what they add is not seen", "")
    given = out.reshape(-1, out.shape[-1])[list(reads)]
    inner = writer(model, i, "mlp", total if biases is None else total + biases, None, given)
    if inner.norm is not None:
        raise UnsupportedError(f"experts of layer {i}", "a norm lies between their sum and their neurons", "")
    constant = torch.zeros_like(total) if biases is None else biases * inner.factor
    rest = parts.mlp - given.float()  # shared experts, and whatever else the block adds
    share = float(rest.norm() / parts.mlp.norm())
    tap = model.layers[i].read["mlp.out"]
    if share > rounding(model.dtype) and not (tap.where == "out" and _holds(tap.module, model.layers[i].experts)):
        raise UnsupportedError(f"experts of layer {i}", "what lies between them and the stream is not understood", "")
    how = Writer(inner.factor, None, constant + rest, inner.error)
    return [Group(i, "expert.act", how, rows[e], coef[:, e][:, None], expert=e) for e in routed], share


def _listen_to_gates(model: WatchedModel, exits: ExitStack, layers: Sequence[int], found: dict[int, Tensor]) -> None:
    """Keep what the heads' output matrix of each layer takes in, [pos, head, channel], where that is gated."""
    for i in layers:
        plan = model.layers[i]
        if plan.gated:

            def keep(module: Any, args: Any, i: int = i, heads: int = plan.attention.heads) -> None:
                found[i] = args[0].detach().reshape(-1, heads, args[0].shape[-1] // heads)

            exits.callback(model.hf.get_submodule(plan.w_o).register_forward_pre_hook(keep).remove)


def _over(a: Tensor, b: Tensor) -> Tensor:
    """The quotient of two tensors; 0 where the second is."""
    a, b = a.float(), b.float()
    return torch.where(b == 0, torch.zeros_like(b), a / b)


def _holds(path: str, inner: str) -> bool:
    """Whether the module at ``inner`` lies inside the one at ``path``."""
    return inner.startswith(path + ".")


def _listen_to_experts(model: WatchedModel, exits: ExitStack, found: dict[int, Tensor]) -> None:
    """Keep what every experts module gives in the pass that follows."""
    for i, plan in enumerate(model.layers):
        if plan.experts and plan.has("expert.act"):

            def keep(module: Any, args: Any, out: Any, i: int = i) -> None:
                found[i] = (out if isinstance(out, Tensor) else out[0]).detach()

            exits.callback(model.hf.get_submodule(plan.experts).register_forward_hook(keep).remove)
