"""Interventions: pure changes of an activation, at a site.

Each is a value ``(site, ...)`` with one function ``change(x, where) -> x`` of equal shape and dtype; ``x`` holds just
the part that the site names (its heads or neurons, its positions), with all axes kept. Text forms, for the command line
and for records: ``zero SITE`` · ``scale SITE 0.5`` · ``mean SITE`` (mean over the rows and positions of the call).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cutaway.core.errors import InterventionError
from cutaway.core.site import Site, SiteLike
from cutaway.core.trace import Trace


class Where(NamedTuple):
    """Where an intervention is being applied.

    Attributes:
        site: the concrete site. axes: the names of ``x``'s axes.
        real: which entries stand for real tokens, broadcastable to ``x``; None when there is no padding among them.
        chunk: where ``x`` starts among the positions, in layers that attend chunk by chunk; None in others.
    """

    site: Site
    axes: tuple[str, ...]
    real: Tensor | None = None
    chunk: int | None = None


@dataclass(frozen=True, eq=False)
class Intervention:
    """Base of all interventions; ``at`` is a site or its text."""

    at: SiteLike

    @property
    def site(self) -> Site:
        """Where it acts."""
        return Site.parse(self.at) if isinstance(self.at, str) else self.at

    def change(self, x: Tensor, where: Where) -> Tensor:
        """The new value of ``x``, equal in shape and dtype; ``x`` itself must stay as it is."""
        raise TypeError(f"{type(self).__name__} defines no change(x, where)")

    def __call__(self, x: Tensor, where: Where) -> Tensor:
        """``change`` with its result checked. Raises InterventionError naming what came back."""
        before = None if x.is_inference() else x._version
        new = self.change(x, where)
        asked = f"intervention '{self}' at '{where.site}'"
        if before is not None and x._version != before:
            raise InterventionError(asked, "it wrote into the activation it was given", "return a new tensor")
        if not isinstance(new, Tensor):
            raise InterventionError(asked, f"it returned {type(new).__name__}", "return a tensor")
        if new.shape != x.shape or new.dtype != x.dtype or new.device != x.device:
            came, due = (f"{list(t.shape)} {t.dtype} on {t.device}" for t in (new, x))
            axes = ", ".join(where.axes)
            raise InterventionError(asked, f"it returned {came} for {due} ({axes})", "return the same shape and dtype")
        bad = self._unusable(new, where)
        if bool(bad.any()) and bool((bad := bad & torch.isfinite(x)).any()):
            found = f"{int(bad.sum())} of {new.numel()} values are NaN or infinite"
            raise InterventionError(asked, found, "check its arithmetic")
        return new

    @staticmethod
    def _unusable(new: Tensor, where: Where) -> Tensor:
        """Masked attention scores are infinite by nature, all else is finite."""
        return torch.isnan(new) if where.site.kind == "attn.scores" else ~torch.isfinite(new)

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()} {self.site}"


POSITION_AXES = ("pos", "query_pos", "key_pos")


def _fitted(value: Tensor | float, x: Tensor, what: str, where: Where) -> Tensor:
    """``value`` on x's device and dtype, broadcast to its shape."""
    tensor = torch.as_tensor(value).to(x.device, x.dtype)
    if where.chunk is not None and tensor.ndim == x.ndim:
        for i, axis in enumerate(where.axes):
            if axis in POSITION_AXES and tensor.shape[i] >= where.chunk + x.shape[i]:
                tensor = tensor.narrow(i, where.chunk, x.shape[i])
    try:
        return tensor.expand(x.shape)
    except RuntimeError:
        found = f"the value is {list(tensor.shape)}, the place is {list(x.shape)} {where.axes}"
        raise InterventionError(f"{what} at '{where.site}'", found, "give a value that broadcasts to it") from None


@dataclass(frozen=True, eq=False)
class Zero(Intervention):
    """x becomes 0."""

    def change(self, x: Tensor, where: Where) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True, eq=False)
class _WithValue(Intervention):
    value: Tensor | float

    def __str__(self) -> str:
        number = f" {self.value:g}" if isinstance(self.value, int | float) else ""
        return f"{super().__str__()}{number}"


@dataclass(frozen=True, eq=False)
class Set(_WithValue):
    """x becomes ``value`` (broadcast)."""

    def change(self, x: Tensor, where: Where) -> Tensor:
        return _fitted(self.value, x, "set", where).clone()


@dataclass(frozen=True, eq=False)
class Add(_WithValue):
    """x becomes x + ``value`` (broadcast)."""

    def change(self, x: Tensor, where: Where) -> Tensor:
        return x + _fitted(self.value, x, "add", where)


@dataclass(frozen=True, eq=False)
class Scale(_WithValue):
    """x becomes x * ``value`` (broadcast)."""

    def change(self, x: Tensor, where: Where) -> Tensor:
        return x * _fitted(self.value, x, "scale", where)


@dataclass(frozen=True, eq=False)
class Mean(Intervention):
    """x becomes ``value``, a mean taken elsewhere; without it the mean of x over its batch and position axes.

    Padding does not count; while generating, the mean is over what the call sees.
    """

    value: Tensor | None = None

    def change(self, x: Tensor, where: Where) -> Tensor:
        if self.value is not None:
            return _fitted(self.value, x, "mean", where).clone()
        if where.chunk is not None:
            found = "this layer attends chunk by chunk, so that no place sees them all"
            raise InterventionError(f"mean at '{where.site}'", found, "take the mean of a trace: Mean(site, value)")
        over = [i for i, axis in enumerate(where.axes) if axis in ("batch", "image_token", *POSITION_AXES)]
        if where.real is None:
            return x.mean(dim=over, keepdim=True).expand_as(x).clone()
        real = where.real.to(x.device).expand_as(x)
        total = torch.where(real, x, 0).sum(dim=over, keepdim=True)
        return (total / real.sum(dim=over, keepdim=True)).to(x.dtype).expand_as(x).clone()


@dataclass(frozen=True, eq=False)
class Project(Intervention):
    """x loses its part along ``direction`` (``keep=False``), or keeps only that part.

    ``direction`` is [n] or [k, n] over the last axis; its rows must be linearly independent.
    """

    direction: Tensor
    keep: bool = False

    def change(self, x: Tensor, where: Where) -> Tensor:
        rows = self.direction.reshape(-1, self.direction.shape[-1]).to(x.device, torch.float32)
        if rows.shape[-1] != x.shape[-1]:
            found = f"the direction has {rows.shape[-1]} numbers, the last axis {where.axes[-1]!r} has {x.shape[-1]}"
            raise InterventionError(f"project at '{where.site}'", found, "give a direction of that length")
        basis = torch.linalg.qr(rows.T).Q
        part = (x.float() @ basis) @ basis.T
        return (part if self.keep else x.float() - part).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Swap(Intervention):
    """x becomes what another run had there: ``source`` is a trace that holds the same selection.

    ``source_site`` names the place to read in ``source`` when it is another one than ``at``.
    """

    source: Trace
    source_site: SiteLike | None = None

    def change(self, x: Tensor, where: Where) -> Tensor:
        return _fitted(self.source[self.source_site or where.site], x, "swap", where).clone()


@dataclass(frozen=True, eq=False)
class Apply(Intervention):
    """x becomes ``function(x, where)``: any change of your own."""

    function: Callable[[Tensor, Where], Tensor]

    def change(self, x: Tensor, where: Where) -> Tensor:
        return self.function(x, where)

    def __str__(self) -> str:
        return f"apply {self.site} {getattr(self.function, '__name__', 'function')}"


_TEXT: dict[str, type[Intervention]] = {"zero": Zero, "mean": Mean, "scale": Scale, "add": Add, "set": Set}


def parse_intervention(text: str) -> Intervention:
    """The intervention of a text such as ``zero L3.attn.z[5]`` or ``scale L2.mlp.act[7]@-1 0.5``."""
    words = text.split()
    asked = f"intervention {text!r}"
    if not words or words[0] not in _TEXT:
        raise InterventionError(asked, f"it must start with {', '.join(_TEXT)}", "write 'zero L3.attn.z[5]'")
    takes_number = issubclass(_TEXT[words[0]], _WithValue)
    if len(words) != (3 if takes_number else 2):
        form = f"{words[0]} SITE{' NUMBER' if takes_number else ''}"
        raise InterventionError(asked, f"it has {len(words)} words", f"write '{form}'")
    if not takes_number:
        return _TEXT[words[0]](words[1])
    try:
        number = float(words[2])
    except ValueError:
        raise InterventionError(asked, f"{words[2]!r} is not a number", "write 'scale L2.mlp.out 0.5'") from None
    return _TEXT[words[0]](words[1], number)  # type: ignore[call-arg]
