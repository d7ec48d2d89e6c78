"""Say where two results differ, and by how much."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cutaway.core.result import Result


@dataclass(frozen=True)
class Difference:
    """How two results differ: ``lines`` to read, ``largest`` the biggest gap per array. Falsy when equal."""

    lines: tuple[str, ...] = ()
    largest: dict[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.lines)

    def __str__(self) -> str:
        return "; ".join(self.lines) or "equal"


def compare(ours: Result, theirs: Result, rtol: float, atol: float) -> Difference:
    """``Difference`` of two results' content; provenance and notes do not count."""
    if ours.kind != theirs.kind:
        return Difference((f"one is a {ours.kind}, the other a {theirs.kind}",))
    lines: list[str] = []
    largest: dict[str, float] = {}

    def numbers(name: str, dims: tuple[str, ...], a: np.ndarray, b: np.ndarray) -> None:
        if a.shape != b.shape or a.dtype != b.dtype:
            lines.append(f"{name}: {a.dtype}{list(a.shape)} against {b.dtype}{list(b.shape)}")
            return
        if a.dtype.kind == "f":
            with np.errstate(invalid="ignore"):
                gap = np.abs(a.astype(np.float64) - b)
                near = np.isfinite(gap) & (gap <= atol + rtol * np.abs(a))
            equal = (a == b) | (np.isnan(a) & np.isnan(b))
            far = ~(equal | near)
            gap = np.where(equal, 0.0, np.where(np.isnan(gap), np.inf, gap))
            largest[name] = float(gap.max(initial=0.0))
        else:
            far, gap = a != b, None
        count = int(far.sum())
        if count:
            # argmax of the gap when there is one, else the first place that differs
            at = np.unravel_index(int(np.argmax(far if gap is None else np.where(far, gap, -1.0))), a.shape)
            place = ", ".join(f"{dim} {i}" for dim, i in zip(dims, at, strict=True))
            by = "" if gap is None else f", largest by {gap[at]:.3g}"
            lines.append(f"{name}: {count} of {a.size} differ{by} (at {place}: {a[at]} against {b[at]})")

    def values(name: str, a: Any, b: Any) -> None:
        if a != b and repr(a) != repr(b):  # by text too: a NaN setting equals itself
            lines.append(f"{name}: {a!r} against {b!r}")

    mine, other = ours.arrays(), theirs.arrays()
    for name in sorted(mine.keys() ^ other.keys()):
        lines.append(f"{name}: only in the {'first' if name in mine else 'second'}")
    for name in [each for each in mine if each in other]:
        numbers(name, ours.dims()[name], mine[name], other[name])
    for name, a in ours.plain_fields().items():
        values(name, a, theirs.plain_fields()[name])
    for field_name, parts in ours.held().items():
        others = theirs.held()[field_name]
        values(field_name, sorted(parts), sorted(others))
        for part in parts.keys() & others.keys():
            found = compare(parts[part], others[part], rtol, atol)
            lines += [f"{part}: {line}" for line in found.lines]
            largest |= {f"{part}/{name}": gap for name, gap in found.largest.items()}
    values("labels", ours.labels, theirs.labels)
    if ours.check and theirs.check:
        values("check", ours.check.name, theirs.check.name)
        values("check holds", ours.check.holds, theirs.check.holds)
        numbers("check value", (), np.array(ours.check.value, np.float64), np.array(theirs.check.value, np.float64))
    elif ours.check or theirs.check:
        values("check", ours.check, theirs.check)
    if ours.proof and theirs.proof:
        for name in ("ablated", "ks", "metric", "unit", "matched", "n_distinct"):
            values(f"proof {name}", getattr(ours.proof, name), getattr(theirs.proof, name))
        numbers("proof effect", ("k",), ours.proof.effect, theirs.proof.effect)
        numbers("proof random", ("draw", "k"), ours.proof.random, theirs.proof.random)
    elif ours.proof or theirs.proof:
        values("proof", ours.proof, theirs.proof)
    return Difference(tuple(lines), largest)
