"""What a result says about itself: how it was made, its sanity number, and its causal proof."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from cutaway.core.errors import ResultError


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a result was made: enough to make it again, and to say whether the second one is equal.

    ``params`` are the method's parameters in their text form; ``model`` is what was loaded, ``model_digest`` its
    weights; ``seconds`` is wall time; ``created`` an ISO time with its zone.
    """

    method: str
    stage: str = ""
    params: dict[str, str] = field(default_factory=dict)
    model: str = ""
    model_digest: str = ""
    inputs_digest: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    device: str = ""
    dtype: str = ""
    seconds: float | None = None
    created: str = ""

    def code(self) -> str:
        """The Python that makes the result again."""
        arguments = "".join(f",\n    {name}={text!r}" for name, text in self.params.items())
        return f"cutaway.run({self.method!r}, cutaway.load({self.model!r}){arguments})"

    def command(self) -> str:
        """The command line that makes the result again."""
        options = [word for name, text in self.params.items() for word in (f"--{name.replace('_', '-')}", text)]
        return " ".join(["cutaway", self.method, *(shlex.quote(word) for word in (self.model, *options))])


@dataclass(frozen=True, kw_only=True)
class Check:
    """A result's own sanity number: it holds while ``|value| <= tolerance`` (NaN never holds).

    ``name`` says what was measured ("layer scores sum to the total"), ``sentence`` may add what that means.
    """

    name: str
    value: float
    tolerance: float
    sentence: str = ""

    @property
    def holds(self) -> bool:
        return bool(abs(self.value) <= self.tolerance)

    def __str__(self) -> str:
        verdict = f"error {self.value:.2g}, tolerance {self.tolerance:.2g}"
        return f"{self.name}: {'holds' if self.holds else 'DOES NOT HOLD'} ({verdict})" + (
            f". {self.sentence}" if self.sentence else ""
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Proof:
    """The causal check of a locating result: does ablating what it names do more than ablating random others?

    ``effect[k]`` is what ablating the first ``ks[k]`` named components does to the metric, ``random[draw, k]`` what
    equally many random ones do, drawn with the same ``matched`` profile. Larger means stronger (a drop is positive).
    The verdict is taken at the largest k, in three ways that must agree: there is an effect, it lies above ``LEVEL`` of
    the draws, and a one-sided prediction interval (Student's t, n - 1 degrees of freedom) puts it above what one more
    draw gives. What is told beside it is the p-value by rank, which cannot fall below 1 / (draws + 1).

    ``distinct`` is how many of the random sets of the largest size differ, where components are so few that some were
    drawn twice; all of them where it is None.

    Raises:
        ResultError: fewer than ``MIN_DRAWS`` draws, or shapes that do not line up.
    """

    MIN_DRAWS: ClassVar[int] = 5
    LEVEL: ClassVar[float] = 0.95

    ablated: str
    ks: tuple[int, ...]
    effect: Any
    random: Any
    metric: str
    unit: str
    matched: str = "kind and layer"
    distinct: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ks", tuple(int(k) for k in self.ks))
        for name in ("effect", "random"):
            value = getattr(self, name)
            if hasattr(value, "detach"):
                value = value.detach().cpu()
            array = np.array(value, dtype=np.float64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if not self.ks or list(self.ks) != sorted(set(self.ks)):
            raise ResultError("a proof", f"its set sizes are {self.ks}", "give increasing sizes, at least one")
        if self.effect.shape != (len(self.ks),) or self.random.ndim != 2 or self.random.shape[1] != len(self.ks):
            raise ResultError(
                f"a proof for {len(self.ks)} set sizes",
                f"effect has shape {self.effect.shape} and random {self.random.shape}",
                f"give ({len(self.ks)},) and (draws, {len(self.ks)})",
            )
        if self.n_draws < self.MIN_DRAWS:
            raise ResultError("a proof", f"{self.n_draws} random draws", f"draw at least {self.MIN_DRAWS}")
        if not 1 <= self.n_distinct <= self.n_draws:
            raise ResultError("a proof", f"{self.distinct} of {self.n_draws} draws differ", "give 1 to all of them")

    @property
    def n_draws(self) -> int:
        return int(self.random.shape[0])

    @property
    def n_distinct(self) -> int:
        """How many of the random sets of the largest size differ."""
        return self.n_draws if self.distinct is None else self.distinct

    @property
    def percentile(self) -> np.ndarray:
        """Share of the random draws that the named set exceeds, [k], in 0..1."""
        return np.asarray((self.random < self.effect).mean(axis=0))

    @property
    def p_value(self) -> np.ndarray:
        """Chance that random components do as much, by rank, [k]: (1 + draws that do) / (1 + draws that differ).

        NaN where a number is not finite.
        """
        there = np.isfinite(self.effect) & np.isfinite(self.random).all(axis=0)
        return np.where(there, (1 + self._reached) / (1 + self.n_distinct), np.nan)

    @property
    def _reached(self) -> np.ndarray:
        """How many draws do as much, [k]; not more than there are that differ."""
        return np.minimum((self.random >= self.effect).sum(axis=0), self.n_distinct)

    @property
    def evidence(self) -> str:
        """The p-value at the largest k with no more digits than the draws give: ``p = 2/6``, ``p <= 1/6``."""
        if not np.isfinite(self.p_value[-1]):
            return "p unknown"
        reached, all_differ = int(self._reached[-1]), self.n_distinct == self.n_draws
        return f"p {'=' if reached and all_differ else '<='} {1 + reached}/{1 + self.n_distinct}"

    @property
    def _limit(self) -> str:
        """Why p is not smaller, where more draws could make it so."""
        if self.n_distinct < self.n_draws:
            return f", since only {self.n_distinct} of the draws differ"
        return f", as small as {self.n_draws} draws allow" if not self._reached[-1] else ""

    @property
    def tail(self) -> np.ndarray:
        """Chance that one more draw would do as much if draws were normal, [k]; NaN where a number is not finite."""
        from scipy.special import stdtr

        n = self.n_draws
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = self.random.std(axis=0, ddof=1) * np.sqrt(1 + 1 / n)
            t = (self.effect - self.random.mean(axis=0)) / spread
        # All draws equal: any effect above them is certain, an effect equal to them is no evidence.
        t = np.where((spread == 0) & (self.effect == self.random[0]), 0.0, t)
        return np.asarray(1 - stdtr(n - 1, t))

    @property
    def holds(self) -> bool:
        """Whether the named set does something, and more than random ones; less of a gain than theirs is no proof."""
        return bool(self.effect[-1] > 0 and self.percentile[-1] >= self.LEVEL and self.tail[-1] <= 1 - self.LEVEL)

    @property
    def sentence(self) -> str:
        """The verdict with its numbers, in one line."""
        k, effect, draws = self.ks[-1], self.effect[-1], self.random[:, -1]
        verdict = "more than" if self.holds else "NO loss, against" if effect <= 0 else "NOT reliably more than"
        return (
            f"{self.ablated} (k = {k}) changes {self.metric} by {effect:.3g} {self.unit}, {verdict} {self.n_draws} "
            f"random draws matched by {self.matched} (mean {draws.mean():.3g}, largest {draws.max():.3g}; "
            f"{self.evidence}{self._limit})"
        )

    def __str__(self) -> str:
        return self.sentence
