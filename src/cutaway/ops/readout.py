"""From the last residual stream to the logits as a linear map: the final norm's scale is frozen.

    logits(x) = after( W ( gain * P(x) / s + shift ) + bias )

with ``s`` taken from the final state of a position and kept for every intermediate state and every single component, so
that what they add up to is what the model says. ``after`` is what follows the head: a constant factor, a soft cap.
Found from the steps that the model was seen to take, by measuring them; verified against the model's own logits.

Source: Yu and Ananiadou (2024), "Neuron-level knowledge attribution in large language models"; there the scale is
frozen in the code, and the norm's shift is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cutaway.core.errors import UnsupportedError
from cutaway.ops.norms import FrozenNorm, Norm, measure
from cutaway.ops.watched import Step, WatchedModel, rounding

Scale = Literal["final", "own", "none"]
VOCABULARY_PART = 16384  # rows of the head that are multiplied, or widened, at a time
CACHED_PART = 1024  # as many as a processor keeps near with what they give: twice as fast as all at once
NOTHING = 1e-6  # of the most that a vector could raise a token by: rounding
TRIED = 512  # tokens on which the linear form is compared with the model's own logits
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
        some = _spread(logits)
        found = replace(readout, scale="final").only(some).logits(final)
        error = float((found - logits.float()[:, some]).abs().max())
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

    def floor(self, v: Tensor) -> Tensor:
        """[..., R] what rounding alone may make of the projection of vectors: tokens raised by less are not raised."""
        return NOTHING * self.norm(v.float()).norm(dim=-1) * self.head.row_squares.max().sqrt()

    def pull(self, dz: Tensor) -> Tensor:
        """[..., R, d] gradient with respect to a vector, from that of its projection, ``dz`` [..., R, tokens]."""
        return self.norm.pull(self.unprojected(dz))

    def unprojected(self, dz: Tensor) -> Tensor:
        """[..., d] what numbers [..., tokens] become through the transposed matrix alone."""
        parts = zip(dz.split(self._part, dim=-1), self.weight.split(self._part), strict=True)
        return sum((a @ w.float() for a, w in parts), torch.zeros((), device=dz.device))

    def entering(self, x: Tensor) -> Tensor:
        """[..., R, d] whole states as they enter the matrix."""
        if self.scale == "own":
            with torch.no_grad():
                return self.head.normed(x.to(self.head.model.dtype)).float()
        return self.norm(x.float()) + self.norm.norm.shift

    def states(self, x: Tensor) -> Tensor:
        """[..., R, tokens] the matrix's result for whole states, constants included."""
        z = self._times(self.entering(x))
        return z if self.bias is None else z.add_(self.bias)

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

    def logp(self, x: Tensor, ids: Tensor) -> Tensor:
        """[..., R] log-probability of one token per position, ``ids`` [R], from whole states [..., R, d].

        The vocabulary is gone through in parts; no tensor of all its logits is made.
        """
        rows = self.entering(x)
        sums = [self._after(rows @ w.T, b).logsumexp(-1) for w, b in self._parts()]
        return self._own(rows, ids) - torch.stack(sums).logsumexp(0)

    def logp_and_gradient(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``logp`` of states [..., R, d], and its gradient [..., R, d] with respect to them, in one pass."""
        rows = self.entering(x)
        top = torch.full((*rows.shape[:-1], 1), float("-inf"), device=rows.device)
        total, mean = torch.zeros_like(top), torch.zeros_like(rows)
        for w, b in self._parts():
            y, slope = self._with_slope(rows @ w.T, b)
            new = torch.maximum(top, y.amax(-1, keepdim=True))
            kept, p = (top - new).exp(), (y - new).exp_()
            total = total * kept + p.sum(-1, keepdim=True)
            mean = (mean * kept).add_((p if slope is None else p * slope) @ w)
            top = new
        weight = self.weight[ids].float()
        z = (rows * weight).sum(-1, keepdim=True)
        own, slope = self._with_slope(z, None if self.bias is None else self.bias[ids][:, None])
        gradient = (weight if slope is None else weight * slope) - mean / total
        return (own - top - total.log())[..., 0], self._pulled(x, gradient)

    def gradient_of_difference(self, x: Tensor) -> Tensor:
        """[..., R, d] gradient of the first token's logit minus the second's with respect to states [..., R, d]."""
        z = self.entering(x) @ self.weight[:2].float().T
        _, slope = self._with_slope(z, None if self.bias is None else self.bias[:2])
        pair = torch.tensor([1.0, -1.0], device=z.device).expand_as(z)
        return self._pulled(x, (pair if slope is None else pair * slope) @ self.weight[:2].float())

    def _pulled(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to states, from that with respect to how they enter the matrix."""
        if self.linear:
            return self.norm.pull(gradient)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            entered = self.head.normed(x.to(self.head.model.dtype))
            (dx,) = torch.autograd.grad(entered, x, gradient.to(entered.dtype))
        return dx

    def _own(self, rows: Tensor, ids: Tensor) -> Tensor:
        """[..., R] logits of one token per position from what enters the matrix."""
        z = (rows * self.weight[ids].float()).sum(-1)
        return self.finish(z if self.bias is None else z + self.bias[ids])

    def _after(self, z: Tensor, bias: Tensor | None) -> Tensor:
        return self.finish(z if bias is None else z.add_(bias))

    def _with_slope(self, z: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits of the matrix's result, and their derivatives with respect to it; None where they are 1."""
        if not self.head.after:
            return self._after(z, bias), None
        with torch.enable_grad():
            z = (z if bias is None else z + bias).detach().requires_grad_()
            y = self.finish(z)
            (slope,) = torch.autograd.grad(y.sum(), z)
        return y.detach(), slope

    @property
    def _part(self) -> int:
        return CACHED_PART if self.weight.device.type == "cpu" else VOCABULARY_PART

    def _parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The matrix [tokens, d] and bias [tokens] by parts of the vocabulary, in float32."""
        for start in range(0, len(self.weight), self._part):
            at = slice(start, start + self._part)
            yield self.weight[at].float(), None if self.bias is None else self.bias[at]

    def _times(self, v: Tensor) -> Tensor:
        return torch.cat([v @ part.float().T for part in self.weight.split(self._part)], dim=-1)


def _spread(logits: Tensor) -> list[int]:
    """Tokens that a readout is tried on: the likeliest of every position, and as many evenly over the vocabulary."""
    n = logits.shape[-1]
    likely = logits.topk(min(TRIED, n), dim=-1).indices.flatten().tolist()
    return sorted({*likely, *range(0, n, max(1, n // TRIED))})


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
