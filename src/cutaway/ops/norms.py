"""What a norm does, measured: its gain and shift, and whether it centres. Nothing is read off its name.

Every norm met on the way to the logits is ``gain * P(x) / s(x) + shift``, with P the identity (RMSNorm) or the removal
of the mean (LayerNorm). Frozen at one state its scale ``s`` is a number, and the norm becomes a linear map of whatever
is added up in that state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway.core.errors import UnsupportedError

Map = Callable[[Tensor], Tensor]
PROBE = 64.0  # so large that no epsilon under the root is seen, and exact in every floating-point type


@dataclass(frozen=True)
class Norm:
    """``x -> gain * P(x) / s(x) + shift``.

    Attributes:
        gain, shift: [d], float32.
        centres: P removes the mean over the last axis.
        divides: whether there is a scale; without one s is 1.
    """

    gain: Tensor
    shift: Tensor
    centres: bool
    divides: bool

    def centred(self, x: Tensor) -> Tensor:
        """P(x)."""
        return x - x.mean(dim=-1, keepdim=True) if self.centres else x

    def inverse_scale(self, x: Tensor, y: Tensor) -> Tensor:
        """[...] 1 / s(x) of states ``x`` [..., d] whose normed form ``y`` is known; by least squares, so no epsilon."""
        if not self.divides:
            return torch.ones_like(x[..., 0])
        linear = (self.gain * self.centred(x)).double()
        size = (linear * linear).sum(-1)
        return (((y - self.shift).double() * linear).sum(-1) / size.clamp_min(torch.finfo(size.dtype).tiny)).float()


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with the scales of R states: linear maps, one per state.

    Attributes:
        norm: what it was. inverse: [R] 1 / s of each state.
    """

    norm: Norm
    inverse: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        """[..., R, d] what vectors that are added up in the states become; the shift is left out."""
        return self.norm.gain * self.norm.centred(v) * self.inverse[:, None]

    def pull(self, g: Tensor) -> Tensor:
        """[..., R, d] the transposed map: ``<g, self(v)> == <pull(g), v>``."""
        return self.norm.centred(self.norm.gain * g) * self.inverse[:, None]


def measure(function: Map, d: int, device: torch.device, dtype: torch.dtype, what: str) -> Norm:
    """The norm that ``function`` ([n, d] -> [n, d]) is, found from its values at a few states.

    Raises:
        UnsupportedError: it is no norm of the form above; ``what`` names it in the sentence.
    """
    generator = torch.Generator().manual_seed(0)
    sign = (torch.rand(d, generator=generator) < 0.5).float() * 2 - 1
    x = PROBE * sign.to(device)
    other = torch.randn(d, generator=generator).to(device) * PROBE
    states = torch.stack([x, -x, x + 8 * PROBE, 2 * x, other])
    try:
        with torch.no_grad():
            y = _wide(function, states, dtype)
    except Exception as problem:  # a module that is no norm may refuse states in any way
        found = f"it takes no single states ({type(problem).__name__})"
        raise UnsupportedError(what, found, "read whole states instead") from problem
    if y.shape != states.shape or not bool(torch.isfinite(y).all()):
        raise UnsupportedError(what, f"it gives {list(y.shape)} for {list(states.shape)}", "read whole states instead")
    shift, odd = (y[0] + y[1]) / 2, (y[0] - y[1]) / 2
    size = float(y[0].abs().max())
    near = 1e-3 if dtype in (torch.float32, torch.float64) else 16 * torch.finfo(dtype).eps
    divides = not _close(y[3] - shift, 2 * odd, near * size)
    centres = divides and _close(y[2], y[0], near * size)
    centred = x - x.mean() if centres else x
    scale = centred.square().mean().sqrt() if divides else torch.ones((), device=device)
    norm = Norm(odd * scale / centred, shift, centres, divides)
    inverse = norm.inverse_scale(other, y[4])
    if not _close(FrozenNorm(norm, inverse[None])(other[None])[0] + shift, y[4], near * float(y[4].abs().max())):
        raise UnsupportedError(what, "it is neither a norm with gain and shift nor linear", "read whole states instead")
    return norm


def _wide(function: Map, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The function's values, computed in float32 where it lets us."""
    try:
        return function(x).float()
    except RuntimeError:  # its weights refuse another dtype than their own
        return function(x.to(dtype)).float()


def _close(a: Tensor, b: Tensor, within: float) -> bool:
    return float((a - b).abs().max()) <= within
