"""How a layer reads the residual stream: values, and pre-activations of its MLP, as linear maps of what is added up.

Both are a matrix applied to the normed stream. With the norm frozen at the run's own states each becomes
``sum over parts of (sub-key . part) + constant``: a sub-key is a row of the matrix taken back through the norm, a
vector of the residual space. Checked on the run itself; what is not found again is refused.

Source: Yu and Ananiadou (2024), "Neuron-level knowledge attribution in large language models", for the sub-keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cutaway.core.errors import UnsupportedError
from cutaway.ops.norms import FrozenNorm, measure
from cutaway.ops.watched import WatchedModel, rounding
from cutaway.ops.writers import rows_of

Activation = Callable[[Tensor, Tensor | None], Tensor]


class Keys(NamedTuple):
    """Sub-keys of k numbers at one position: what a part of the stream brings to number i is ``vectors[i] . part``.

    Attributes:
        vectors: [k, d]. constant: [k] what is there without any part: biases, and the norm's shift.
    """

    vectors: Tensor
    constant: Tensor


@dataclass(frozen=True)
class Reader:
    """A linear map from the residual stream at P positions to ``out`` numbers, the norm in front of it frozen.

    Attributes:
        weight: [out, d] the matrix, in the model's dtype. norm: frozen; None without one.
        constant: [out] what is read whatever the stream holds: biases, and the norm's shift through the matrix.
        states: [P, d] the streams that it was frozen at. unfrozen: the norm itself.
        error: largest gap to what the layer itself read, relative to the largest number of it.
    """

    weight: Tensor
    norm: FrozenNorm | None
    constant: Tensor
    states: Tensor
    error: float
    unfrozen: nn.Module | None = None

    def __call__(self, parts: Tensor) -> Tensor:
        """[..., P, out] what vectors [..., P, d] that are added up in the stream bring; the constant is left out."""
        normed = parts if self.norm is None else self.norm(parts)
        return normed @ self.weight.float().T

    def pull(self, g: Tensor) -> Tensor:
        """[..., P, d] the transposed map of gradients [..., P, out]."""
        back = g @ self.weight.float()
        return back if self.norm is None else self.norm.pull(back)

    def keys(self, index: Sequence[int], row: int) -> Keys:
        """The sub-keys of some of the numbers at one of the P positions."""
        at = torch.tensor(list(index), device=self.weight.device)
        rows = self.weight[at].float()
        if self.norm is not None:
            rows = self.norm.norm.centred(self.norm.norm.gain * rows) * self.norm.inverse[row]
        return Keys(rows, self.constant[at])

    def again(self, states: Tensor, index: Sequence[int]) -> Tensor:
        """[..., k] what some of the numbers would be at other states [..., d], each normed by its own scale."""
        at = torch.tensor(list(index), device=self.weight.device)
        if self.norm is None or self.unfrozen is None:
            return states @ self.weight[at].float().T + self.constant[at]
        with torch.no_grad():
            y = self.unfrozen(states.to(self.weight.dtype)).float() - self.norm.norm.shift
        return y @ self.weight[at].float().T + self.constant[at]


@dataclass(frozen=True)
class MlpReaders:
    """How an MLP, or one expert, makes its activations: ``f(up)``, or a product such as ``f(gate) * up``.

    Attributes:
        up, gate: the readers of the pre-activations; gate is None in an MLP without one.
        read_up, read_gate: [P, d_mlp] the pre-activations of the run, constants included.
        function: what makes activations [..., n] of pre-activations [..., n].
    """

    up: Reader
    gate: Reader | None
    read_up: Tensor
    read_gate: Tensor | None
    function: Activation

    @property
    def error(self) -> float:
        """The larger error of the readers."""
        return self.up.error if self.gate is None else max(self.up.error, self.gate.error)

    def activation(self, up: Tensor, gate: Tensor | None) -> Tensor:
        """[..., n] activations of pre-activations [..., n]."""
        with torch.no_grad():
            return self.function(up, gate).float()

    def keys(self, index: Sequence[int], row: int) -> Keys:
        """The sub-keys of some neurons' activations m at one of the P positions: they share m out, exactly.

        Without a gate a part that brings u_i to the pre-activation U gets ``m u_i / U``. With one, both factors must be
        there: it gets ``m (u_i / U + g_i / G) / 2``, with m / U the slope of the factor that is linear, so that a U
        of zero is no exception. What is divided by a zero G, or a constant beside U, counts as constant.
        """
        at = torch.tensor(list(index), device=self.read_up.device)
        u = self.read_up[row, at]
        g = None if self.read_gate is None else self.read_gate[row, at]
        m = self.activation(u, g)
        up = self.up.keys(index, row)
        if self.gate is None or g is None:
            slope = _over(m, u)
            return Keys(up.vectors * slope[:, None], up.constant * slope + m - slope * u)
        gate, by_up, by_gate = self.gate.keys(index, row), self._slope(u, g) / 2, _over(m, g) / 2
        rest = m - by_up * u - by_gate * g
        vectors = up.vectors * by_up[:, None] + gate.vectors * by_gate[:, None]
        return Keys(vectors, up.constant * by_up + gate.constant * by_gate + rest)

    def _slope(self, u: Tensor, g: Tensor) -> Tensor:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.function(u, g).float().sum(), u)
        return slope

    def again(self, states: Tensor, index: Sequence[int]) -> Tensor:
        """[..., k] what some neurons' activations would be at other states [..., d]."""
        gate = None if self.gate is None else self.gate.again(states, index)
        return self.activation(self.up.again(states, index), gate)


def value_row(plan: Any, head: int, channel: int) -> int:
    """The row of a layer's value reader that a channel of a query head takes its numbers from."""
    attention = plan.attention
    return int(head * attention.kv_heads // attention.heads) * int(attention.d_value) + channel


def value_reader(model: WatchedModel, layer: int, x: Tensor, v: Tensor) -> Reader:
    """How a layer's values are read from the stream; its numbers are channels of key-value heads, head by head.

    Args:
        x: [P, d] the residual stream before the layer at some positions of a run (``resid_pre``).
        v: [P, kv_head, d_value] the values that its attention had there (``attn.v``).

    Raises:
        UnsupportedError: they are not a matrix of the normed stream, or the run's own values are not found again.
    """
    plan = model.layers[layer]
    asked = f"how layer {layer} of {model.name} reads its values"
    if "v" not in plan.intakes:
        raise UnsupportedError(asked, plan.no_intake.get("v", "it did not run when the anatomy was read"), "")
    weight, bias = _matrix(model, plan.intakes["v"])
    reader, _, _ = _reader(model, weight, bias, plan.intakes["v"].norm, x, asked)
    return _checked(model, reader, [(reader(reader.states) + reader.constant, v.flatten(1))], asked)


def mlp_readers(model: WatchedModel, layer: int, x: Tensor, normed: Tensor, act: Tensor) -> MlpReaders:
    """How the pre-activations of a layer's MLP are read from the stream, and what makes activations of them.

    Args:
        x: [P, d] the state that the MLP reads at some positions of a run (``resid_mid``; ``resid_pre`` in parallel
            blocks). normed: [P, d] ``mlp.in`` and act: [P, d_mlp] ``mlp.act`` of that run.

    Raises:
        UnsupportedError: they are not matrices of the normed stream, or the run's own activations are not found again.
    """
    plan = model.layers[layer]
    asked = f"how layer {layer} of {model.name} reads its MLP's input"
    if "up" not in plan.intakes:
        raise UnsupportedError(asked, plan.no_intake.get("mlp", "it did not run when the anatomy was read"), "")
    found: dict[str, tuple[Reader, Tensor]] = {}
    for name in ("up", "gate"):
        if name in plan.intakes:
            weight, bias = _matrix(model, plan.intakes[name])
            reader, y, read = _reader(model, weight, bias, plan.intakes[name].norm, x, asked)
            gaps = [(reader(reader.states) + reader.constant, read), (y, normed)]
            found[name] = _checked(model, reader, gaps, asked), read

    def function(up: Tensor, gate: Tensor | None) -> Tensor:
        f = up if gate is None else gate
        for step in plan.activation:
            f = step.run(model.hf, f)
        return f if gate is None else f * up

    return _activating(model, found["up"], found.get("gate"), function, act, asked)


def expert_readers(model: WatchedModel, layer: int, expert: int, x: Tensor, act: Tensor) -> MlpReaders:
    """The same of one expert.

    Args:
        x: [P, d] the state that the experts read at positions that are routed to it. act: [P, d_expert] its neurons
            there (``expert.act``), without the router's weight.
    """
    plan = model.layers[layer]
    asked = f"how expert {expert} of layer {layer} of {model.name} reads its input"
    if "experts" not in plan.intakes:
        raise UnsupportedError(asked, "it has no experts that transformers' interface serves", "")
    module: Any = model.hf.get_submodule(plan.experts)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    weight = getattr(module, name)[expert].detach()
    weight = weight.T if module.is_transposed else weight
    bias = getattr(module, f"{name}_bias")[expert].detach() if module.has_bias else None
    half, apart = len(weight) // 2, module.is_concatenated
    sides = {"up": slice(None)}
    if module.has_gate:
        sides = {"gate": slice(half) if apart else slice(0, None, 2)}
        sides["up"] = slice(half, None) if apart else slice(1, None, 2)
    found = {}
    for side, rows in sides.items():
        part = None if bias is None else bias[rows]
        reader, _, read = _reader(model, weight[rows], part, plan.intakes["experts"].norm, x, asked)
        found[side] = _checked(model, reader, [(reader(reader.states) + reader.constant, read)], asked), read

    def function(up: Tensor, gate: Tensor | None) -> Tensor:
        if gate is None:
            alone: Tensor = module.act_fn(up)
            return alone
        both = torch.cat([gate, up], -1) if apart else torch.stack([gate, up], -1).flatten(-2)
        made: Tensor = module._apply_gate(both)
        return made

    return _activating(model, found["up"], found.get("gate"), function, act, asked)


def _activating(
    model: WatchedModel,
    up: tuple[Reader, Tensor],
    gate: tuple[Reader, Tensor] | None,
    function: Activation,
    act: Tensor,
    asked: str,
) -> MlpReaders:
    """The readers, if ``function`` makes the run's own activations of what they read."""
    readers = MlpReaders(up[0], gate[0] if gate else None, up[1], gate[1] if gate else None, function)
    try:
        readers.activation(readers.read_up[:, :1], None if readers.read_gate is None else readers.read_gate[:, :1])
    except RuntimeError:
        raise UnsupportedError(asked, "its activation function takes all neurons at once, as a norm does", "") from None
    error = _gap(readers.activation(readers.read_up, readers.read_gate), act)
    if not error <= rounding(model.dtype):
        found = f"its activation function, applied to what was read, misses the activations by {error:.2g} of them"
        raise UnsupportedError(asked, found, "")
    return readers


def _reader(
    model: WatchedModel, weight: Tensor, bias: Tensor | None, norm_path: str, x: Tensor, asked: str
) -> tuple[Reader, Tensor, Tensor]:
    """The reader of a matrix behind a norm, unchecked; what it takes in at ``x``, and [P, out] what it gives."""
    x = x.float()
    if weight.shape[1] != x.shape[1]:
        found = f"their matrix takes {weight.shape[1]} numbers and the stream has {x.shape[1]}"
        raise UnsupportedError(asked, found + ": more than a norm lies in between", "")
    constant = torch.zeros(len(weight), device=x.device) if bias is None else bias.float()
    if not norm_path:
        return Reader(weight, None, constant, x, 0.0), x, x @ weight.float().T + constant
    module = model.hf.get_submodule(norm_path)
    with torch.no_grad():
        y = module(x.to(model.dtype)).float()
    norm = measure(module, x.shape[1], x.device, model.dtype, asked)
    read = y @ weight.float().T + constant
    constant = constant + weight.float() @ norm.shift
    return Reader(weight, FrozenNorm(norm, norm.inverse_scale(x, y)), constant, x, 0.0, module), y, read


def _matrix(model: WatchedModel, intake: Any) -> tuple[Tensor, Tensor | None]:
    """([out, d] the rows of an intake's matrix, [out] its bias)."""
    columns, bias = rows_of(model, intake.module)
    weight, rows = columns.T, intake.rows
    if rows is None:
        return weight, bias
    first, n = rows[0], len(rows)
    which: slice | Tensor = slice(first, first + n)
    if rows != tuple(range(first, first + n)):
        which = torch.tensor(rows, device=weight.device)
    return weight[which], None if bias is None else bias[which]


def _checked(model: WatchedModel, reader: Reader, pairs: Sequence[tuple[Tensor, Tensor]], asked: str) -> Reader:
    """The reader with its error: what it found, and what the run had."""
    error = max(_gap(a, b) for a, b in pairs)
    if not error <= rounding(model.dtype):
        raise UnsupportedError(asked, f"the map found misses what the layer read by {error:.2g} of the largest", "")
    return replace(reader, error=error)


def _gap(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float((a.float() - b.float()).abs().max()) / (float(b.abs().max()) or 1.0)


def _over(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, torch.zeros_like(a), a / b)
