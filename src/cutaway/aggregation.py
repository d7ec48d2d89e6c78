"""A method over many prompts: what holds for most of them, with intervals, by type, and which prompts failed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cutaway import catalog
from cutaway.core.cases import Case
from cutaway.core.errors import CutawayError, InputError, ParameterError, TokenError, broke
from cutaway.core.method import Method, method
from cutaway.core.params import Cases, Count, Settings
from cutaway.core.progress import track
from cutaway.core.proof import Proof
from cutaway.core.result import Result
from cutaway.data.suites import suite
from cutaway.models.handle import Model
from cutaway.results.grid import Grid
from cutaway.results.imagemap import ImageMap
from cutaway.results.ranking import Ranking
from cutaway.results.readout import Readout

SAMPLES, LEVEL = 2000, 0.95
TYPES, TOLD = 8, 5  # columns by type, and failures that are told one by one


@dataclass
class Seen:
    """What the runs gave.

    Attributes:
        values: of each prompt, by component. tops: the first k of each. types: of each prompt.
        proofs: those there were. failed: (number of the prompt, why).
    """

    values: list[dict[str, float]] = field(default_factory=list)
    tops: list[set[str]] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)
    measure: str = ""
    unit: str = ""


@method(example={"method": "neuron_attribution", "prompts": '["#5 #9 #6 #7 #8", "#7 #9 #5 #6 #8"]'})
def aggregate(
    model: Model,
    method: str,
    prompts: Cases,
    settings: Settings | None = None,
    k: Count = 10,
    limit: Count = 100,
    most: Count = 30,
    sources: bool = False,
    seed: int = 0,
) -> Ranking:
    """Which components matter over many prompts: mean effect with its interval, and how often each is among the first.

    The method is run on every prompt. A component that a prompt's result does not list counts there as 0, so let the
    method list as many as there are (``k=144``) where the mean over all is wanted. Prompts that fail are named with
    their reason and left out.

    Args:
        method: its name; one that takes a prompt and gives a ranking, a grid, a readout or an image map.
        prompts: where the prompts are. A case may bring its target, rival, image and type; a suite brings its answers.
        settings: the method's own parameters; those that a case brings come before.
        k: a component appears in a prompt when it is among its first k.
        limit: prompts that are used, evenly from all there are.
        most: how many components are listed.
        sources: keep what heads bring from each position apart, instead of adding it up.
        seed: of the bootstrap.

    Returns:
        components by mean effect: ``low`` and ``high`` are the ends of the 95 % interval of the mean over prompts,
        ``frequency`` the share of prompts in whose first k it is, ``where listed`` the mean over those that list it,
        and a mean by type where there are types. The proof is the mean of the prompts' own.

    Raises:
        InputError: no file or suite, or no prompt that the method could be run on.
        ParameterError: the method takes no prompt or its results have no parts to match between prompts (known before
            anything is run), or a setting is wrong. UnknownMethodError: no such method.
    """
    record, given = catalog.get(method), dict(settings or {})
    _check_fit(record)
    if "prompt" in given:
        raise ParameterError("a setting 'prompt'", "the prompts are given beside the settings", "leave it out")
    record.bind((), {**given, "prompt": "x"})
    every = suite(prompts) if isinstance(prompts, str) else prompts
    chosen = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, min(limit, len(every))).round().astype(int))]
    if issubclass(record.kind, Readout) and "target" not in given and not any(c.target or c.answer for c in chosen):
        hint = "write --settings target=TOKEN, or give cases with targets"
        raise ParameterError(f"method {method!r} over many prompts", "no target is named to be averaged", hint)
    seen = _run(model, record, chosen, given, k, sources)
    if not seen.values:
        found = f"all failed, the first with: {seen.failed[0][1]}"
        raise InputError(f"{method} over {len(chosen)} prompts", found, "")
    listed = sorted({item for values in seen.values for item in values})
    table = np.array([[values.get(item, 0.0) for item in listed] for values in seen.values])
    best = np.argsort(-table.mean(axis=0), kind="stable")[:most]
    named = [listed[i] for i in best]
    return Ranking(
        title=f"{method} over {len(seen.values):,} prompts on {model.name}",
        items=named,
        scores=table[:, best].mean(axis=0),
        columns=_columns(seen, named, table[:, best], k, seed),
        measure=f"mean {seen.measure}",
        unit=seen.unit,
        order="given",
        proof=_proof(seen.proofs),
        notes=_notes(seen, len(every), len(chosen), len(listed)),
    )


def _check_fit(record: Method) -> None:
    """ParameterError when a method cannot be run prompt by prompt, or gives what no mean can be taken of."""
    asked = f"method {record.name!r} over many prompts"
    if "prompt" not in record.parameters:
        own = [n for n in ("prompts", "clean", "corrupt") if n in record.parameters and record.parameters[n].form.many]
        hint = (
            f"it takes many at once: give them to its own {' and '.join(map(repr, own))}" if own else "choose another"
        )
        raise ParameterError(asked, f"it takes {', '.join(record.parameters) or 'nothing'} and no single prompt", hint)
    if not issubclass(record.kind, tuple(PARTS)):
        kinds = ", ".join(kind.__name__ for kind in PARTS)
        fit = [name for name, other in catalog.methods().items() if _fits(other)]
        found = f"it gives a {record.kind.__name__}, whose parts cannot be matched between prompts; a {kinds} can"
        raise ParameterError(asked, found, f"choose one of {', '.join(fit)}")


def _fits(record: Method) -> bool:
    return "prompt" in record.parameters and issubclass(record.kind, tuple(PARTS))


def _run(model: Model, record: Method, cases: Sequence[Case], settings: dict[str, str], k: int, sources: bool) -> Seen:
    seen = Seen()
    for number, case in enumerate(track(cases, record.name, total=len(cases))):
        try:
            result = record.run(model, **{**settings, **_asked(model, record, case, settings)})
            values = values_of(result, sources)
        except CutawayError as error:
            seen.failed.append((number, str(error)))
            continue
        except Exception as error:  # noqa: BLE001 - a prompt that breaks must not cost the others
            seen.failed.append((number, broke(error)))
            continue
        first = sorted(values, key=lambda item: -values[item])[:k]
        seen.values.append(values)
        seen.tops.append({item for item in first if values[item] > 0})
        seen.types.append(case.type)
        seen.proofs += [result.proof] if result.proof is not None else []
        seen.measure, seen.unit = getattr(result, "measure", "log-probability of the target"), result.unit
    return seen


def _asked(model: Model, record: Method, case: Case, settings: dict[str, str]) -> dict[str, Any]:
    """What a case asks of the method. Its answer is the target where that is one token and none is named."""
    found: dict[str, Any] = {"prompt": case.prompt}
    for name in ("target", "versus", "image"):
        value = getattr(case, name)
        if value not in (None, ""):
            if name not in record.parameters:
                raise ParameterError(f"a case with {name!r}", f"{record.name} has no such parameter", "leave it out")
            found[name] = value
    if case.answer and "target" in record.parameters and "target" not in {*found, *settings}:
        with suppress(TokenError):  # an answer of several tokens: the model's own first one is looked at
            found["target"] = model.token(case.answer)
    return found


def values_of(result: Result, sources: bool = False) -> dict[str, float]:
    """What a result says of each thing that other prompts have too.

    Raises:
        ParameterError: a kind of result whose parts cannot be matched between prompts.
    """
    of = next((of for kind, of in PARTS.items() if isinstance(result, kind)), None)
    if of is None:
        found = f"its result is of the kind {result.kind!r}"
        raise ParameterError("aggregate", found, f"give a {', '.join(kind.__name__ for kind in PARTS)}")
    return of(result, sources)


def _of_ranking(ranking: Ranking, sources: bool) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for item, score in zip(ranking.items.tolist(), ranking.scores.tolist(), strict=True):
        found[item if sources else item.partition(" from ")[0]] += score
    return dict(found)


def _of_image(image: ImageMap, _: bool) -> dict[str, float]:
    if not image.figures:
        raise ParameterError("aggregate", "its image map has no figures, and places differ between images", "")
    return dict(image.figures)


def _of_grid(grid: Grid, _: bool) -> dict[str, float]:
    names = [[f"{axis} {label}" for label in _places(grid, axis)] for axis in grid.axes]
    good = [cell for cell in np.ndindex(grid.values.shape) if np.isfinite(grid.values[cell])]
    return {", ".join(n[i] for n, i in zip(names, cell, strict=True)): float(grid.values[cell]) for cell in good}


def _of_readout(readout: Readout, _: bool) -> dict[str, float]:
    if readout.target_log_prob is None:
        raise ParameterError("aggregate", "its readout has no target", "name one: --settings target=TOKEN")
    last = readout.target_log_prob[:, -1].tolist()
    return {f"layer {layer}": value for layer, value in zip(readout.along("layer"), last, strict=True)}


PARTS: dict[type[Result], Callable[[Any, bool], dict[str, float]]] = {
    Ranking: _of_ranking,
    ImageMap: _of_image,
    Grid: _of_grid,
    Readout: _of_readout,
}
"""The kinds of results whose parts other prompts have too, and what each says of them."""


def _places(grid: Grid, axis: str) -> Sequence[object]:
    """Labels of an axis; positions by number, because their tokens differ between prompts."""
    return range(len(grid.along(axis))) if axis == "position" else grid.along(axis)


def _columns(seen: Seen, items: Sequence[str], table: np.ndarray, k: int, seed: int) -> dict[str, Any]:
    from cutaway.ops.stats import bootstrap_means

    low, high = bootstrap_means(torch.tensor(table), SAMPLES, seed, LEVEL)
    there = np.array([[item in values for item in items] for values in seen.values])
    with np.errstate(invalid="ignore"):
        listed = table.sum(axis=0, where=there) / there.sum(axis=0)
    columns: dict[str, Any] = {
        "low": low.numpy(),
        "high": high.numpy(),
        "frequency": np.array([np.mean([item in top for top in seen.tops]) for item in items]),
        "where listed": listed,
        "prompts": there.sum(axis=0),
    }
    types = sorted(set(seen.types) - {""}, key=lambda each: -seen.types.count(each))
    for each in types[:TYPES] if len(types) > 1 else ():
        columns[f"mean: {each}"] = table[np.array(seen.types) == each].mean(axis=0)
    return columns


def _proof(proofs: Sequence[Proof]) -> Proof | None:
    """The mean over prompts of what each one's named set does, against the mean of their random ones."""
    draws = {proof.n_draws for proof in proofs}
    if len(draws) != 1:
        return None
    first = proofs[0]
    return Proof(
        ablated=f"{first.ablated}, each prompt's own, over {len(proofs)} prompts",
        ks=(max(proof.ks[-1] for proof in proofs),),
        effect=[np.mean([proof.effect[-1] for proof in proofs])],
        random=np.mean([proof.random[:, -1:] for proof in proofs], axis=0),
        metric=first.metric,
        unit=first.unit,
        matched=first.matched,
        distinct=max(proof.n_distinct for proof in proofs),  # means differ where one of their parts does
    )


def _notes(seen: Seen, there: int, used: int, components: int) -> tuple[str, ...]:
    kinds = sorted(set(seen.types) - {""}, key=lambda each: -seen.types.count(each))
    notes = [f"{used:,} of {there:,} prompts, {len(seen.failed)} of them failed; {components:,} components appear"]
    if kinds:
        notes.append("by type: " + ", ".join(f"{each} {seen.types.count(each)}" for each in kinds[:TYPES]))
    if seen.proofs:
        held = sum(proof.holds for proof in seen.proofs)
        notes.append(f"the proof holds in {held} of {len(seen.proofs)} prompts")
    notes += [f"prompt {number + 1} failed: {why}" for number, why in seen.failed[:TOLD]]
    if len(seen.failed) > TOLD:
        notes.append(f"{len(seen.failed) - TOLD} more failed")
    return tuple(notes)
