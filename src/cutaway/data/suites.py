"""Named suites: the prompts of the worlds that come with Cutaway, as cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cutaway.core.cases import Case
from cutaway.core.errors import InputError, nearest

from .examples import Example, select
from .labels import Labels
from .recall import recall
from .scenes import PLANTED, QUESTIONS, Scenes
from .town import Town

COUNT = 200
"""Prompts of a suite whose world has no end."""


def suites() -> dict[str, str]:
    """What each suite holds, by name; ``town:city`` stands for a form or a skill of the town."""
    names = {
        "town": "every sentence of the town, by skill",
        "labels": "in-context labels, eight shots",
        "recall": "associative recall, six pairs",
    }
    town = {f"town:{name}": f"{name} in the town" for name in _town_names()}
    scenes = {f"scenes:{kind.replace(' ', '-')}": f"questions of {kind} about scenes" for kind in QUESTIONS}
    biased = {
        f"scenes:absent-{planted}": f"is there a {planted}? beside a {plain}" for plain, planted in PLANTED.items()
    }
    return {**names, **town, **scenes, **biased, "scenes:absent": "questions about shapes that are not there"}


def suite(name: str) -> tuple[Case, ...]:
    """The cases of a suite; the answer of each is the true one.

    Raises:
        InputError: there is no suite of that name.
    """
    world, _, part = name.partition(":")
    makers: dict[str, Callable[[str], Iterable[Case]]] = {"town": _town, "scenes": _scenes}
    if name == "labels":
        return tuple(map(_case, Labels().examples(COUNT)))
    if name == "recall":
        return tuple(map(_case, recall(COUNT)))
    found = tuple(makers[world](part)) if world in makers else ()
    if not found:
        hint = nearest(name, suites()) or f"suites: {', '.join(list(suites())[:12])} ..."
        raise InputError(f"prompts {name!r}", "there is no such file, and no suite of that name", hint)
    return found


def _case(example: Example) -> Case:
    return Case(prompt=example.prompt, answer=example.answer, type=example.form.partition("/")[0])


def _town_names() -> list[str]:
    every = list(Town().examples())
    skills, forms = dict.fromkeys(e.skill for e in every), dict.fromkeys(e.form.partition("/")[0] for e in every)
    return [*skills, *forms]


def _town(part: str) -> Iterable[Case]:
    every = list(Town().examples())
    chosen = every if not part else select(every, skill=part) or select(every, form=part)
    if part:
        return map(_case, chosen)
    return (Case(prompt=e.prompt, answer=e.answer, type=e.skill) for e in chosen)


def _scenes(part: str) -> list[Case]:
    world, kinds = Scenes(seed=0), {kind.replace(" ", "-"): kind for kind in QUESTIONS}
    biased = {f"absent-{planted}": plain for plain, planted in PLANTED.items()}
    if part in kinds:
        asked = world.exam(COUNT, kinds[part])
    elif part in biased:
        asked = world.hallucinations(COUNT, biased[part])
    elif part == "absent":
        asked = world.absent(COUNT)
    else:
        return []
    return [Case(prompt=e.prompt, answer=e.answer, image=scene.image(), type=e.form) for scene, e in asked]
