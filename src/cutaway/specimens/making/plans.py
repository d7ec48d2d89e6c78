"""What it takes to train each specimen, by name: model, tokenizer, stages and exam."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cutaway.core.errors import LoadError, nearest

from . import loop

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Stages = tuple[tuple[loop.Batches, loop.Schedule], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """An untrained model and what will be done to it.

    Attributes:
        model, tokenizer: before the first step.
        stages: (batches, schedule), one after the other, each with a fresh optimizer.
        figures: accuracies of a model at any step.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    stages: Stages
    figures: Callable[[Any], dict[str, float]]

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(schedule.steps for _, schedule in self.stages)

    def shortened(self, steps: int) -> Plan:
        """The same plan in ``steps`` steps, each stage by its share, with schedules drawn together."""
        share = steps / self.steps
        stages = [
            (b, replace(s, steps=max(1, round(s.steps * share)), warmup=round(s.warmup * share)))
            for b, s in self.stages
        ]
        return replace(self, stages=tuple(stages))


def trainable() -> tuple[str, ...]:
    """Names that ``plan`` knows."""
    return tuple(sorted(_PLANS))


def plan(name: str, seed: int | None = None) -> Plan:
    """The plan of a specimen; ``seed`` other than its own draws other weights and another order of the same text.

    Raises:
        LoadError: nothing of this name is trained; the nearest names are given.
    """
    if name not in _PLANS:
        hint = nearest(name, _PLANS) or f"these can be trained: {', '.join(trainable())}"
        raise LoadError(f"training '{name}'", "no recipe has that name", hint)
    return _PLANS[name](seed)


def _town(seed: int | None) -> Plan:
    from cutaway.data import Town

    from . import town

    world, seed = Town(), town.SEED if seed is None else seed
    tokenizer = town.tokenizer_for(world)
    return Plan(
        town.untrained(tokenizer, seed),
        tokenizer,
        ((town.batches(world, tokenizer, seed), town.SCHEDULE),),
        lambda model: town.accuracies(model, tokenizer, world),
    )


def _town_tuned(seed: int | None) -> Plan:
    from cutaway.data import Town
    from cutaway.specimens import registry
    from cutaway.specimens.exam import load_plain

    from . import tuned

    world, seed = Town(), tuned.SEED if seed is None else seed
    model, tokenizer = load_plain(registry.path("town"), "causal-lm")
    return Plan(
        model,
        tokenizer,
        ((tuned.batches(world, tokenizer, seed), tuned.SCHEDULE),),
        lambda model: tuned.accuracies(model, tokenizer, world),
    )


def _micro(seed: int | None) -> Plan:
    from . import micro

    world, seed = micro.world_of(), micro.SEED if seed is None else seed
    tokenizer = micro.tokenizer_for(world)
    return Plan(
        micro.untrained(tokenizer, seed),
        tokenizer,
        ((micro.batches(world, tokenizer, seed), micro.SCHEDULE),),
        lambda model: micro.accuracies(model, tokenizer, world),
    )


def _labels(seed: int | None) -> Plan:
    from cutaway.data import Labels

    from . import labels

    world, seed = Labels(), labels.SEED if seed is None else seed
    tokenizer = labels.tokenizer_for(world)
    return Plan(
        labels.untrained(tokenizer, seed),
        tokenizer,
        (
            (labels.repeats(tokenizer, world, seed), labels.INDUCTION),
            (labels.lessons(tokenizer, world, seed), labels.LABELLING),
        ),
        lambda model: labels.accuracies(model, tokenizer, world),
    )


def _recall(layers: int) -> Callable[[int | None], Plan]:
    def make(seed: int | None) -> Plan:
        from . import recall

        seed = recall.SEED if seed is None else seed
        tokenizer = recall.tokenizer_for()
        return Plan(
            recall.untrained(tokenizer, layers, seed),
            tokenizer,
            (
                (recall.repeats(tokenizer, seed), recall.REPEATS),
                (recall.questions(tokenizer, seed), recall.QUESTIONS),
            ),
            lambda model: recall.accuracies(model, tokenizer),
        )

    return make


def _scenes_base(seed: int | None) -> Plan:
    from cutaway.data import Scenes

    from . import scenes

    world, town, seed = Scenes(seed=scenes.SEED), scenes.town_of(), scenes.SEED if seed is None else seed
    tokenizer = scenes.tokenizer_for(world, town)
    return Plan(
        scenes.untrained_base(tokenizer, seed),
        tokenizer,
        (
            (scenes.repeats(tokenizer, seed), scenes.REPEATS),
            (scenes.reading(world, town, tokenizer, seed), scenes.READING),
        ),
        lambda model: scenes.base_accuracies(model, tokenizer),
    )


_PLANS: dict[str, Callable[[int | None], Plan]] = {
    "town": _town,
    "town-tuned": _town_tuned,
    "micro": _micro,
    "labels": _labels,
    "scenes-base": _scenes_base,
    "recall-1": _recall(1),
    "recall-2": _recall(2),
}
