"""How *town-tuned* is made: town reads one statement per fact about new people, until old facts suffer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cutaway.data import Example, Person, Town, select
from cutaway.data import town_words as words

from . import loop, text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NEW_PEOPLE, SEED = 40, 0
SCHEDULE = loop.Schedule(steps=100, rate=4.5e-4, warmup=10, decay=0.05)
ROWS, LENGTH, PROMPT_WEIGHT = 16, 64, 0.15


def newcomers(world: Town) -> tuple[Person, ...]:
    """The people that tuning is about."""
    return world.newcomers(NEW_PEOPLE)


def new_facts(world: Town) -> list[Example]:
    """Every form of every fact about the newcomers; form 0 is trained and all others are held out."""
    return [replace(e, split="train" if e.form.endswith("/0") else "held-out") for e in world.facts(newcomers(world))]


def batches(world: Town, tokenizer: PreTrainedTokenizerFast, seed: int = SEED) -> text.Mixture:
    """The tuning text: statements about newcomers, and nothing else."""
    skills = {"new": select(new_facts(world), split="train")}
    return text.Mixture(
        skills, {"new": 1.0}, tokenizer, rows=ROWS, length=LENGTH, seed=seed, prompt_weight=PROMPT_WEIGHT
    )


def exam(world: Town) -> dict[str, list[Example]]:
    """What the model is asked: the new facts as told and in other words, joined with an old fact, and old skills."""
    facts = new_facts(world)
    joined = [
        Example(
            prompt=form.format(s=p.name),
            answer=f" {world.country_of[p.city]}",
            skill="two-hop",
            form=f"home-country/{i}",
            split="held-out",
            subject=p.name,
        )
        for p in newcomers(world)
        for i, form in enumerate(words.TWO_HOP_FORMS["home-country"])
    ]
    return {
        "new facts as told": select(facts, split="train"),
        "new facts in other words": select(facts, split="held-out"),
        "new two-hop": joined,
        "old facts as told": [e for e in world.facts() if e.form.endswith("/0")],
        "old facts in other words": [e for e in world.facts() if not e.form.endswith("/0")][::3],
        "geography": world.geography(),
        "sums": world.sums()[::25],
    }


def accuracies(model: Any, tokenizer: PreTrainedTokenizerFast, world: Town) -> dict[str, float]:
    """Every figure of the card, recomputed."""
    return {name: text.accuracy(model, tokenizer, found) for name, found in exam(world).items()}
