"""From what the parts of a layer compute to what they add to the residual stream, checked on the run itself.

Heads go through one matrix, FFN neurons through another, expert neurons through their expert's. What the matrix gives
may be multiplied by a constant, or pass through a norm (Gemma 2 and 3, OLMo 2), whose scale is then frozen too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cutaway.core.errors import UnsupportedError
from cutaway.ops.norms import FrozenNorm, measure
from cutaway.ops.watched import WatchedModel, rounding

EXACT = 1e-4  # so near, a factor is all that lies between; in low precision a norm of even gain can look like one


@dataclass(frozen=True)
class Writer:
    """How vectors that a matrix writes reach the residual stream at R positions.

    Attributes:
        factor: what they are multiplied with. norm: the norm they pass, frozen; None without one.
        constant: [R, d] what is written whatever the coefficients are: biases, and a norm's shift.
        error: largest part of the layer's own output that all vectors and the constant together miss, relative to it.
    """

    factor: float
    norm: FrozenNorm | None
    constant: Tensor
    error: float

    def __call__(self, v: Tensor) -> Tensor:
        """[..., R, d] what vectors [..., R, d] add to the residual stream."""
        return self.norm(v) if self.norm is not None else v if self.factor == 1.0 else v * self.factor

    def pull(self, g: Tensor) -> Tensor:
        """The transposed map of gradients."""
        return self.norm.pull(g) if self.norm is not None else g if self.factor == 1.0 else g * self.factor

    def at(self, row: int) -> Writer:
        """The writer of one of the R positions."""
        norm = None if self.norm is None else FrozenNorm(self.norm.norm, self.norm.inverse[row : row + 1])
        return Writer(self.factor, norm, self.constant[row : row + 1], self.error)


def rows_of(model: WatchedModel, path: str) -> tuple[Tensor, Tensor | None]:
    """([in, d] what each input of a linear module writes, [d] its bias)."""
    module: Any = model.hf.get_submodule(path)
    weight: Tensor = module.weight.detach()
    bias = getattr(module, "bias", None)
    transposed = type(module).__name__ == "Conv1D"  # GPT-2 keeps [in, out]
    return weight if transposed else weight.T, bias.detach() if isinstance(bias, Tensor) else None


def writer(model: WatchedModel, layer: int, side: str, total: Tensor, bias: Tensor | None, out: Tensor) -> Writer:
    """The way of ``total`` [R, d], the sum of all vectors, to ``out`` [R, d], what the layer's side added.

    Raises:
        UnsupportedError: neither a constant factor nor the norm behind the matrix makes one the other.
    """
    total, out = total.float(), out.float()
    written = total if bias is None else total + bias.float()
    size = float(out.abs().max()) or 1.0
    allowed = rounding(model.dtype)
    a, b = written.double().flatten(), out.double().flatten()
    factor = float(a @ b / (a @ a)) if bool(a.any()) else 1.0
    factor = 1.0 if abs(factor - 1) <= allowed else factor
    error = float((written * factor - out).abs().max()) / size
    constant = torch.zeros_like(out) if bias is None else (bias.float() * factor).expand_as(out)
    plain = Writer(factor, None, constant, error)
    asked = f"what the parts of layer {layer}'s {'attention' if side == 'attn' else 'MLP'} write"
    behind = _behind(model, layer, side)
    if behind is None:
        if error > allowed:
            raise UnsupportedError(asked, "between their matrix and the residual stream lies more than a factor", "")
        return plain
    if error <= EXACT:
        return plain
    try:
        through = _normed(model, behind, total, bias, out, asked)
    except (UnsupportedError, TypeError):
        if error > allowed:
            raise
        return plain
    if min(through.error, error) > allowed:
        raise UnsupportedError(asked, f"their sum misses what the layer adds by {through.error:.2g} of it", "")
    return min(through, plain, key=lambda way: way.error)


def _normed(
    model: WatchedModel, module: nn.Module, total: Tensor, bias: Tensor | None, out: Tensor, asked: str
) -> Writer:
    """The way through a norm, frozen."""

    def normed(x: Tensor) -> Tensor:
        y: Tensor = module(x)
        return y

    try:
        norm = measure(normed, out.shape[-1], out.device, model.dtype, asked)
    except UnsupportedError as problem:
        found = f"between their matrix and the residual stream lies {type(module).__name__}, which is no norm"
        raise UnsupportedError(asked, found, "") from problem
    with torch.no_grad():
        after = module((total if bias is None else total + bias.float()).to(model.dtype)).double()
    factor = float(after.flatten() @ out.double().flatten() / (after * after).sum()) if bool(after.any()) else 1.0
    if abs(factor - 1) > rounding(model.dtype):  # HyperCLOVA X multiplies what it normed
        norm = replace(norm, gain=norm.gain * factor, shift=norm.shift * factor)
    frozen = FrozenNorm(norm, norm.inverse_scale(total if bias is None else total + bias.float(), out))
    constant = norm.shift.expand_as(out)
    if bias is not None:
        constant = constant + frozen(bias.float().expand_as(out))
    error = float((frozen(total) + constant - out).abs().max()) / (float(out.abs().max()) or 1.0)
    return Writer(1.0, frozen, constant, error)


def _behind(model: WatchedModel, layer: int, side: str) -> nn.Module | None:
    """The module between a side's output matrix and the residual stream; None where there is none."""
    plan = model.layers[layer]
    tap = plan.read[f"{side}.out"]
    if tap.where == "op" and side in plan.behind:
        return model.hf.get_submodule(plan.behind[side])
    if tap.where != "out" or any(
        path == tap.module or path.startswith(tap.module + ".") for path in (plan.w_o, plan.w_out, plan.experts) if path
    ):
        return None
    module: nn.Module = model.hf.get_submodule(tap.module)
    return module


def expert_rows(model: WatchedModel, layer: int) -> Tensor:
    """[expert, neuron, d] what each neuron of each expert writes."""
    module: Any = model.hf.get_submodule(model.layers[layer].experts)
    weight: Tensor = module.down_proj.detach()
    return weight if module.is_transposed else weight.transpose(1, 2)
