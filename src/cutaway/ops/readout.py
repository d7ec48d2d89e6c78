"""From the last residual stream to the logits as a linear map: the final norm's scale is frozen.

    logits(x) = after( W ( gain * P(x) / s + shift ) + bias )

with ``s`` taken from the final state of a position and kept for every intermediate state and every single component, so
that what they add up to is what the model says. ``after`` is what follows the head: a constant factor, a soft cap.
Found from the steps that the model was seen to take, by measuring them; verified against the model's own logits.

Source: Yu and Ananiadou (2024), "Neuron-level knowledge attribution in large language models"; there the scale is
frozen in the code, and the norm's shift is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cutaway.core.errors import UnsupportedError
from cutaway.ops.norms import FrozenNorm, Norm, measure
from cutaway.ops.watched import Step, WatchedModel, rounding

Scale = Literal["final", "own", "none"]
VOCABULARY_PART = 16384  # rows of a head in low precision that are widened at a time
FEW_ROWS = 64  # up to so many, a processor is up to twice as fast with the vocabulary's matrix on the left
CURVATURE = 4 / (3 * 3**0.5)  # largest second derivative of tanh


class Head:
    """The steps from the last residual stream to the logits, taken apart: norm, matrix, and what follows.

    Raises:
        UnsupportedError: the steps are not known, or not of that form.
    """

    def __init__(self, model: WatchedModel) -> None:
        anatomy = model.anatomy()
        self.model = model
        self.asked = f"the readout of {type(model.hf).__name__}"
        if "readout" in anatomy.refused or not anatomy.tail:
            why = anatomy.refused.get("readout", "the way from the last residual stream to the logits is not known")
            raise UnsupportedError(self.asked, why, "read sites instead")
        steps: Sequence[Step] = anatomy.tail
        at = next((i for i in reversed(range(len(steps))) if _matrix(model.hf, steps[i]) is not None), None)
        matrix = None if at is None else _matrix(model.hf, steps[at])
        if at is None or matrix is None:
            raise UnsupportedError(self.asked, "no step to the logits is one matrix", "read sites instead")
        self.weight, self.bias = matrix
        self.before, self.after = steps[:at], steps[at + 1 :]
        odd = next((s for s in self.after if not _scalar(s)), None)
        if odd is not None:
            found = f"after the head comes {odd.module or getattr(odd.call[0], '__name__', 'a call')}"
            raise UnsupportedError(self.asked, f"{found}, which does not treat every token alike", "read sites instead")

    @cached_property
    def norm(self) -> Norm:
        """The final norm; one without a scale where the model has none."""
        weight = self.weight
        return measure(self.normed, weight.shape[1], weight.device, self.model.dtype, self.asked)

    @cached_property
    def row_squares(self) -> Tensor:
        """[vocab] squared length of every token's row."""
        return torch.cat([part.float().square().sum(-1) for part in self.weight.split(VOCABULARY_PART)])

    def normed(self, x: Tensor) -> Tensor:
        """[..., d] states as they enter the head."""
        return self._run(self.before, x)

    def finish(self, z: Tensor) -> Tensor:
        """Logits of what the matrix gives; differentiable."""
        return self._run(self.after, z) if self.after else z

    def _run(self, steps: Sequence[Step], x: Tensor) -> Tensor:
        y = x.reshape(1, -1, x.shape[-1])
        for step in steps:
            y = step.run(self.model.hf, y)
        return y.reshape(x.shape)

    @cached_property
    def slope_and_cap(self) -> tuple[float, float] | None:
        """``after(z) = cap * tanh(slope * z / cap) + after(0)``; cap is infinite where it is linear. None for others.

        They are measured, and compared with ``after`` at many numbers.
        """
        at = torch.linspace(-40.0, 40.0, 161, dtype=torch.float64, device=self.weight.device)
        y = self.finish(at)
        y = y - y[80]
        slope = float(self.finish(at.new_tensor([1e-4])) - self.finish(at.new_tensor([-1e-4]))) / 2e-4
        if bool(torch.allclose(y, slope * at, rtol=1e-5, atol=1e-6)):
            return slope, float("inf")
        cap = float(self.finish(at.new_tensor([1e9])) - self.finish(at.new_tensor([0.0])))
        if cap > 0 and bool(torch.allclose(y, cap * torch.tanh(slope * at / cap), rtol=1e-4, atol=1e-5)):
            return slope, cap
        return None

    def frozen(self, final: Tensor, logits: Tensor, scale: Scale = "final") -> FrozenReadout:
        """The readout with the scales of R final states [R, d], whose logits [R, vocab] the model gave.

        Raises:
            UnsupportedError: frozen so, the final states do not give those logits.
        """
        final = final.float()
        with torch.no_grad():
            y = self.normed(final.to(self.model.dtype)).float()
        inverse = self.norm.inverse_scale(final, y)
        readout = FrozenReadout(self, FrozenNorm(self.norm, inverse), scale, self.weight)
        found = replace(readout, scale="final").logits(final)
        error = float((found - logits.float()).abs().max())
        allowed = rounding(self.model.dtype) * max(1.0, float(logits.abs().max()))
        if not error <= allowed:
            raise UnsupportedError(self.asked, f"its linear form gives logits off by {error:.2g}", "use scale='own'")
        if scale == "none":
            return replace(readout, norm=FrozenNorm(self.norm, torch.ones_like(inverse)))
        return readout


@dataclass(frozen=True)
class FrozenReadout:
    """Logits of states and of single vectors at R positions, each under its own constant scale.

    Attributes:
        head: where it comes from. norm: the final norm, frozen. scale: "own" norms every state by itself instead.
        weight: [tokens, d] the head's matrix, or the rows of a few tokens.
        ids: the tokens of those rows; None for all.
    """

    head: Head
    norm: FrozenNorm
    scale: Scale
    weight: Tensor
    ids: Tensor | None = None

    @property
    def linear(self) -> bool:
        """Whether what vectors add to the matrix's result is linear in them."""
        return self.scale != "own"

    def only(self, ids: Sequence[int]) -> FrozenReadout:
        """The readout of a few tokens alone."""
        at = torch.tensor(list(ids), device=self.weight.device)
        return replace(self, weight=self.head.weight[at], ids=at)

    def project(self, v: Tensor) -> Tensor:
        """[..., R, tokens] what vectors [..., R, d] add to the matrix's result (before ``after``)."""
        return self._times(self.norm(v.float()))

    def pull(self, dz: Tensor) -> Tensor:
        """[..., R, d] gradient with respect to a vector, from that of its projection, ``dz`` [..., R, tokens]."""
        return self.norm.pull(self.unprojected(dz))

    def unprojected(self, dz: Tensor) -> Tensor:
        """[..., d] what numbers [..., tokens] become through the transposed matrix alone."""
        if self.weight.dtype == torch.float32:
            return dz @ self.weight
        parts = zip(dz.split(VOCABULARY_PART, dim=-1), self.weight.split(VOCABULARY_PART), strict=True)
        return sum((a @ w.float() for a, w in parts), torch.zeros((), device=dz.device))

    def states(self, x: Tensor) -> Tensor:
        """[..., R, tokens] the matrix's result for whole states, constants included."""
        if self.scale == "own":
            with torch.no_grad():
                normed = self.head.normed(x.to(self.head.model.dtype)).float()
            z = self._times(normed)
            return z if self.bias is None else z + self.bias
        z = self.project(x)
        return z if self.constant is None else z + self.constant

    def logits(self, x: Tensor) -> Tensor:
        """[..., R, tokens] logits of whole states."""
        return self.finish(self.states(x))

    def finish(self, z: Tensor) -> Tensor:
        """Logits of the matrix's result."""
        return self.head.finish(z)

    @cached_property
    def bias(self) -> Tensor | None:
        """[tokens] the head's bias."""
        bias = self.head.bias
        return None if bias is None else (bias if self.ids is None else bias[self.ids]).float()

    @cached_property
    def constant(self) -> Tensor | None:
        """[tokens] what states get beside their linear part: the norm's shift through the matrix, and the bias."""
        shift = self.norm.norm.shift
        through = self._times(shift) if bool(shift.any()) else None
        return self.bias if through is None else through if self.bias is None else through + self.bias

    def _times(self, v: Tensor) -> Tensor:
        if self.weight.dtype == torch.float32:
            rows = v.numel() // v.shape[-1]
            if v.device.type == "cpu" and rows <= FEW_ROWS:
                flat = (self.weight @ v.reshape(rows, -1).T).T
                return flat.contiguous().view(*v.shape[:-1], -1)
            return v @ self.weight.T
        return torch.cat([v @ part.float().T for part in self.weight.split(VOCABULARY_PART)], dim=-1)


def _matrix(hf: nn.Module, step: Step) -> tuple[Tensor, Tensor | None] | None:
    """(weight [out, in], bias) of a step that is one matrix; None for others."""
    if step.call is None:
        module = hf.get_submodule(step.module)
        if isinstance(module, nn.Linear) and module.weight.is_floating_point():
            return module.weight.detach(), None if module.bias is None else module.bias.detach()
        return None
    func, args, kwargs = step.call
    if getattr(func, "__name__", "") == "linear" and step.slot == 0 and len(args) > 1 and isinstance(args[1], Tensor):
        bias: Any = args[2] if len(args) > 2 else kwargs.get("bias")
        return args[1].detach(), None if bias is None else bias.detach()
    return None


def _scalar(step: Step) -> bool:
    """Whether a step treats all numbers alike: a call of an elementwise function with plain numbers."""
    if step.call is None:
        return False
    _, args, kwargs = step.call
    others = [a for i, a in enumerate(args) if i != step.slot] + list(kwargs.values())
    return all(
        a.ndim == 0 if isinstance(a, Tensor) else isinstance(a, int | float | torch.dtype | None) for a in others
    )
