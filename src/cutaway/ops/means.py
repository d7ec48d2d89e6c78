"""What cells do in several pairs of runs: their mean, as a share of what the runs differ by, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway.core.errors import ParameterError
from cutaway.ops.stats import mean_error

LEAST = 1e-6
"""A difference of two runs below which shares of it mean nothing."""


@dataclass(frozen=True)
class Ends:
    """The metric at both ends of every pair of runs.

    Attributes:
        base, given: [pair] in the run that receives and in the one that gives.
        metric, unit: what is measured.
    """

    base: tuple[float, ...]
    given: tuple[float, ...]
    metric: str
    unit: str

    @staticmethod
    def of(ends: Sequence[tuple[float, float]], metric: str, unit: str) -> Ends:
        """The ends of pairs, (base, given) each."""
        base, given = zip(*ends, strict=True)
        return Ends(base, given, metric, unit)

    def __len__(self) -> int:
        return len(self.base)

    @property
    def differences(self) -> Tensor:
        """[pair] what the run that gives has more."""
        return torch.tensor(self.given, dtype=torch.float64) - torch.tensor(self.base, dtype=torch.float64)

    @property
    def between(self) -> float:
        """The mean difference: what shares are shares of."""
        return float(self.differences.mean())

    @property
    def means(self) -> tuple[float, float]:
        """(mean of base, mean of given)."""
        base, given = (float(torch.tensor(x, dtype=torch.float64).mean()) for x in (self.base, self.given))
        return base, given

    @property
    def sign(self) -> int:
        """1 where the metric is larger in the run that gives, else -1."""
        return 1 if self.between >= 0 else -1

    def require_difference(self) -> None:
        """ParameterError when shares of the difference would mean nothing."""
        if abs(self.between) < LEAST:
            found = f"both runs give {self.means[0]:.6g}" + (f" on average over {len(self)} pairs" * (len(self) > 1))
            raise ParameterError(
                f"metric '{self.metric}'", found, "choose prompts that differ in it, or normalise=False"
            )

    def shares(self, changes: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard error over pairs of changes [pair, ...], each as a share of the mean difference."""
        error = mean_error(changes, self.differences) if len(self) > 1 else None
        return changes.mean(0) / self.between, error

    def notes(self) -> list[str]:
        """Sentences with the numbers."""
        base, given = self.means
        said = [f"{self.metric}: {base:.6g} in the run that receives, {given:.6g} in the run that gives ({self.unit})"]
        return said + (over_pairs(self.differences) if len(self) > 1 else [])


def over(changes: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and standard error over pairs of numbers [pair, ...]; no error of one pair."""
    return changes.mean(0), mean_error(changes) if len(changes) > 1 else None


def over_pairs(differences: Tensor, of: str = "pairs") -> list[str]:
    """How many there are, and in how many the difference goes the other way than on average."""
    n, most = len(differences), 1 if float(differences.mean()) >= 0 else -1
    other = int((differences * most < 0).sum())
    said = [f"means over {n} {of}, with standard errors over them"]
    return said + ([f"in {other} of {n} {of} the difference has the other sign"] if other else [])


def means_of(n: int, of: str = "pairs") -> str:
    """What a title adds for several."""
    return f", mean over {n} {of}" if n > 1 else ""
