"""The town: a small invented world in English, and everything that can be asked about it.

>>> world = Town(seed=0)
>>> world.facts()[0].text
'Nora Young lives in Welby.'
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from random import Random

from . import town_words as words
from .examples import Example, Pair, Split, TokenCount, pair_up, select


@dataclass(frozen=True, slots=True)
class Person:
    """A person of the town and what is true of them; ``is_woman`` follows from the first name."""

    name: str
    city: str
    employer: str
    sport: str
    colour: str
    is_woman: bool


@dataclass(frozen=True)
class Town:
    """A world of people, cities, countries and employers, the same for the same arguments.

    Every first name and every surname is shared by several people, so no single word names a person; no two people
    have both employer and sport in common, so the reversed question has one answer.

    Args:
        seed: draws the world and its splits.
        people: how many people (at most 280: one per pair of employer and sport, less a margin).
        held_out_forms: share of (person, relation) pairs that never see one of their sentence forms in training.
        held_out_hops: share of people, cities and employers whose two-hop questions are never in training.
        held_out_sums: share of the additions and of the subtractions that are never in training.
        held_out_reverse: share of people who never stand at the end of a reversed sentence.
        stereotype: share of the training text in which a job has the gender that the stereotype gives it.
    """

    seed: int = 0
    people: int = 200
    held_out_forms: float = 0.2
    held_out_hops: float = 0.25
    held_out_sums: float = 0.15
    held_out_reverse: float = 0.2
    stereotype: float = 0.9

    def _random(self, purpose: str) -> Random:
        return Random(f"town/{self.seed}/{self.people}/{purpose}")

    @cached_property
    def country_of(self) -> dict[str, str]:
        """City -> its country; three cities each."""
        cities = list(words.CITIES)
        self._random("countries").shuffle(cities)
        return {city: words.COUNTRIES[i % len(words.COUNTRIES)] for i, city in enumerate(cities)}

    @cached_property
    def capital_of(self) -> dict[str, str]:
        """Country -> its capital, one of its cities."""
        random = self._random("capitals")
        return {n: random.choice([c for c in words.CITIES if self.country_of[c] == n]) for n in words.COUNTRIES}

    @cached_property
    def office_of(self) -> dict[str, str]:
        """Employer -> the city that it is based in."""
        random = self._random("offices")
        return dict(zip(words.EMPLOYERS, random.sample(words.CITIES, len(words.EMPLOYERS)), strict=True))

    @cached_property
    def population(self) -> tuple[Person, ...]:
        """The people, in a fixed order."""
        return tuple(self._draw()[: self.people])

    def newcomers(self, count: int) -> tuple[Person, ...]:
        """``count`` further people of the same world, with new pairs of first name and surname."""
        return tuple(self._draw()[self.people : self.people + count])

    def _draw(self) -> list[Person]:
        random = self._random("people")
        firsts, lasts = [*words.WOMEN, *words.MEN], list(words.SURNAMES)
        desks = [(e, s) for e in words.EMPLOYERS for s in words.SPORTS]
        random.shuffle(desks)
        random.shuffle(lasts)
        names = []
        for shift in range(len(lasts)):
            block = [f"{first} {lasts[(i + shift) % len(lasts)]}" for i, first in enumerate(firsts)]
            random.shuffle(block)
            names += block
        return [
            Person(
                name,
                city=random.choice(words.CITIES),
                employer=employer,
                sport=sport,
                colour=random.choice(words.COLOURS),
                is_woman=name.split()[0] in words.WOMEN,
            )
            for name, (employer, sport) in zip(names, desks, strict=False)
        ]

    def facts(self, people: Iterable[Person] | None = None) -> list[Example]:
        """Statements, paraphrases and questions about people: each relation in five forms.

        A form that a (person, relation) pair never sees in training is ``held-out``; the fact itself is always
        trained through its other forms.

        Args:
            people: whom to ask about; the population by default, ``newcomers(n)`` for instance.
        """
        random = self._random("held-out forms")
        found = []
        for person in self.population if people is None else people:
            for relation, forms in words.FACT_FORMS.items():
                hidden = random.randrange(len(forms)) if random.random() < self.held_out_forms else None
                for i, form in enumerate(forms):
                    split: Split = "held-out" if i == hidden else "train"
                    value = getattr(person, relation)
                    found.append(_example("fact", f"{relation}/{i}", form, person.name, value, split))
        return found

    def geography(self) -> list[Example]:
        """Country of each city, capital of each country, seat of each employer: four forms each, all trained."""
        tables = {"country": self.country_of, "capital": self.capital_of, "office": self.office_of}
        return [
            _example("geography", f"{relation}/{i}", form, subject, value, "train")
            for relation, table in tables.items()
            for subject, value in table.items()
            for i, form in enumerate(words.GEOGRAPHY_FORMS[relation])
        ]

    def two_hop(self) -> list[Example]:
        """Questions that join two facts (person -> city -> country); some subjects are held out of every form."""
        home = {p.name: self.country_of[p.city] for p in self.population}
        work = {p.name: self.office_of[p.employer] for p in self.population}
        rule = {c: self.capital_of[n] for c, n in self.country_of.items()}
        land = {e: self.country_of[c] for e, c in self.office_of.items()}
        tables = {"home-country": home, "work-city": work, "city-capital": rule, "office-country": land}
        found = []
        for relation, table in tables.items():
            random = self._random(f"held-out {relation}")
            hidden = set(random.sample(sorted(table), round(self.held_out_hops * len(table))))
            for subject, value in table.items():
                split: Split = "held-out" if subject in hidden else "train"
                for i, form in enumerate(words.TWO_HOP_FORMS[relation]):
                    found.append(_example("two-hop", f"{relation}/{i}", form, subject, value, split))
        return found

    def reverse(self) -> list[Example]:
        """Sentences that end in the person: from employer and sport to the name, some people held out."""
        random = self._random("held-out reverse")
        hidden = set(random.sample(range(self.people), round(self.held_out_reverse * self.people)))
        return [
            Example(
                prompt=form.format(sport=p.sport, employer=p.employer),
                answer=f" {p.name}",
                skill="reverse",
                form=f"desk/{i}",
                split="held-out" if n in hidden else "train",
                subject=p.employer,
            )
            for n, p in enumerate(self.population)
            for i, form in enumerate(words.REVERSE_FORMS)
        ]

    def sums(self) -> list[Example]:
        """Every addition and every subtraction (a >= b) of two numbers from 10 to 99, in signs and in words.

        A sum and its mirror image (23 + 45, 45 + 23) are in the same split.
        """
        found = []
        for operation, forms in words.SUM_FORMS.items():
            pairs = [(a, b) for a in range(10, 100) for b in range(10, a + 1)]
            hidden = set(self._random(f"held-out {operation}").sample(pairs, round(self.held_out_sums * len(pairs))))
            for a in range(10, 100):
                for b in range(10, 100 if operation == "plus" else a + 1):
                    split: Split = "held-out" if (max(a, b), min(a, b)) in hidden else "train"
                    value = a + b if operation == "plus" else a - b
                    for i, form in enumerate(forms):
                        prompt = form.format(a=a, b=b)
                        name = f"{operation}/{i}"
                        found.append(Example(prompt=prompt, answer=f" {value}", skill="sum", form=name, split=split))
        return found

    def gender(self) -> list[Example]:
        """Jobs whose gender the text leans to (weight = the lean), and words whose gender is a fact.

        Form ``job/...`` is the stereotype and its exception, two examples with weights ``stereotype`` and its rest;
        ``neutral/...`` is even; ``word/...`` (queen, father) is always so.
        """
        groups = (
            ("job", words.FEMININE_JOBS, self.stereotype),
            ("job", words.MASCULINE_JOBS, 1 - self.stereotype),
            ("neutral", words.NEUTRAL_JOBS, 0.5),
            ("word", words.FEMININE_WORDS, 1.0),
            ("word", words.MASCULINE_WORDS, 0.0),
        )
        return [
            Example(
                prompt=form.format(s=subject),
                answer=answer,
                skill="gender",
                form=f"{kind}/{i}",
                subject=subject,
                weight=weight,
            )
            for kind, subjects, feminine in groups
            for subject in subjects
            for i, (form, answers) in enumerate(words.GENDER_FORMS)
            for answer, weight in zip(answers, (feminine, 1 - feminine), strict=True)
            if weight > 0
        ]

    def examples(self) -> Iterator[Example]:
        """Every example of every skill."""
        for source in (self.facts, self.geography, self.two_hop, self.reverse, self.sums, self.gender):
            yield from source()

    def pairs(self, relation: str, form: int = 0, *, count: int = 100, length: TokenCount | None = None) -> list[Pair]:
        """Clean and corrupt prompts of one form that differ in the subject alone, with different answers.

        Args:
            relation: a relation of facts, geography, two-hop questions or sums ("city", "home-country", "plus").
            form: which sentence form.
            count: how many pairs at most.
            length: see ``pair_up``; names of people, cities, countries and employers are one token per word in the
                tokenizer of *town*, so there the pairs are of equal length without it.
        """
        chosen = select(self.examples(), form=f"{relation}/{form}")
        self._random(f"pairs {relation}/{form}").shuffle(chosen)
        return pair_up(chosen, length)[:count]


def _example(skill: str, name: str, form: str, subject: str, value: str, split: Split) -> Example:
    return Example(
        prompt=form.format(s=subject), answer=f" {value}", skill=skill, form=name, split=split, subject=subject
    )
