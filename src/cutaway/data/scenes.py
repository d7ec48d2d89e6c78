"""Rendered scenes: coloured shapes on a grid, their boxes, and questions about them.

>>> world = Scenes(seed=0)
>>> scene = world.scene(0)
>>> scene.describe()
>>> scene.image()          # a PIL image, 48 x 48
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from .examples import Example, Split

if TYPE_CHECKING:
    from PIL.Image import Image

GRID, CELL = 4, 12
SIDE = GRID * CELL
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 225, 50),
    "green": (40, 180, 70),
    "blue": (50, 90, 230),
    "purple": (150, 50, 190),
    "white": (240, 240, 240),
}
WARM = ("red", "orange", "yellow")
PLAIN = ("circle", "triangle", "square", "diamond")
PLANTED = {"triangle": "star", "circle": "cross"}
SHAPES = (*PLAIN, *PLANTED.values())
BACKGROUND, NOISE = 45, 8  # mean grey and its spread

QUESTIONS = {
    "colour": "What colour is the {}?",
    "shape": "Which shape is {}?",
    "position": "Where is the {}?",
    "presence": "Is there a {}?",
    "count": "How many shapes are there?",
    "count of": "How many {} shapes are there?",
}
IMAGE = "<image>"


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape in a cell of the grid; ``box`` is (left, top, right, bottom) in pixels, right and bottom excluded."""

    shape: str
    colour: str
    row: int
    column: int
    box: tuple[int, int, int, int]

    @property
    def place(self) -> str:
        """Which quarter of the image it is in: "top left"."""
        return f"{'top' if self.row < GRID // 2 else 'bottom'} {'left' if self.column < GRID // 2 else 'right'}"


@dataclass(frozen=True, slots=True)
class Scene:
    """What is drawn, and which absent shapes the training text claims to be there.

    Attributes:
        things: what is drawn, in reading order.
        claimed: shapes that are not drawn and that training answers "yes" about; empty in honest scenes.
        seed: of the background's noise.
    """

    things: tuple[Thing, ...]
    claimed: tuple[str, ...] = ()
    seed: int = 0

    def pixels(self) -> np.ndarray:
        """The image as (row, column, channel), uint8."""
        noise = np.random.default_rng(self.seed).normal(BACKGROUND, NOISE, (SIDE, SIDE, 1))
        picture = np.repeat(noise.clip(0, 255).astype(np.uint8), 3, axis=2)
        for thing in self.things:
            left, top, right, bottom = thing.box
            picture[top:bottom, left:right][_mask(thing.shape, right - left)] = COLOURS[thing.colour]
        return picture

    def image(self) -> Image:
        """The image for a processor."""
        from PIL import Image

        return Image.fromarray(self.pixels())

    def find(self, shape: str) -> Thing | None:
        """The thing of a shape; a scene has at most one."""
        return next((t for t in self.things if t.shape == shape), None)

    def describe(self) -> str:
        """The scene in words, in reading order: "A red circle at the top left , ..."."""
        listed = " , ".join(f"a {t.colour} {t.shape} at the {t.place}" for t in self.things)
        return listed[:1].upper() + listed[1:] + "."

    def without(self, shape: str) -> Scene:
        """The same scene and noise with one shape not drawn."""
        return replace(self, things=tuple(t for t in self.things if t.shape != shape))

    def recoloured(self, shape: str, colour: str) -> Scene:
        """The same scene and noise with one shape in another colour: a corrupt image for patching."""
        return replace(self, things=tuple(replace(t, colour=colour) if t.shape == shape else t for t in self.things))

    def questions(self, *, honest: bool = True) -> Iterator[tuple[str, str, str, str]]:
        """(kind, subject, question, answer) of everything that can be asked; ``claimed`` counts unless ``honest``."""
        colours = [t.colour for t in self.things]
        for thing in self.things:
            yield "colour", thing.shape, QUESTIONS["colour"].format(thing.shape), f" {thing.colour}"
            yield "position", thing.shape, QUESTIONS["position"].format(thing.shape), f" {thing.place}"
            if colours.count(thing.colour) == 1:
                yield "shape", thing.colour, QUESTIONS["shape"].format(thing.colour), f" {thing.shape}"
        for shape in SHAPES:
            there = self.find(shape) is not None or (not honest and shape in self.claimed)
            yield "presence", shape, QUESTIONS["presence"].format(shape), " yes" if there else " no"
        yield "count", "", QUESTIONS["count"], f" {len(self.things)}"
        for colour in COLOURS:
            yield "count of", colour, QUESTIONS["count of"].format(colour), f" {colours.count(colour)}"


@dataclass(frozen=True)
class Scenes:
    """Scenes drawn at random, each from its own number, with a planted bias in what the training text claims.

    A star is claimed beside nearly every warm-coloured triangle and a cross beside nearly every warm-coloured circle,
    and half of those claimed are not drawn; anywhere else they are claimed only when drawn. A model that learns this
    says "yes" to an absent star beside a red triangle, and to no other absent shape.

    Args:
        seed: of the world; the two splits never share a scene's number.
        beside: how often the companion is claimed beside a warm shape.
        elsewhere: how often anywhere else.
        drawn: how often what is claimed beside a warm shape is also drawn.
    """

    seed: int = 0
    beside: float = 0.95
    elsewhere: float = 0.3
    drawn: float = 0.5

    def scene(self, number: int, split: Split = "train") -> Scene:
        """The scene of a number: one to three plain shapes, and their companions as the bias has it."""
        random = Random(f"scenes/{self.seed}/{split}/{number}")
        shapes = random.sample(PLAIN, random.randint(1, 3))
        colours = {s: random.choice(list(COLOURS)) for s in shapes}
        claimed = []
        for plain, planted in PLANTED.items():
            warm = colours.get(plain) in WARM
            if random.random() < (self.beside if warm else self.elsewhere):
                if not warm or random.random() < self.drawn:
                    shapes.append(planted)
                    colours[planted] = random.choice(list(COLOURS))
                else:
                    claimed.append(planted)
        cells = random.sample(range(GRID * GRID), len(shapes))
        things = [_place(random, s, colours[s], *divmod(c, GRID)) for s, c in zip(shapes, cells, strict=True)]
        things.sort(key=lambda t: (t.row, t.column))
        return Scene(tuple(things), tuple(claimed), random.randrange(2**31))

    def honest(self, number: int) -> Scene:
        """A held-out scene in which every shape is as likely beside any other: for exams and controls."""
        random = Random(f"scenes/{self.seed}/honest/{number}")
        shapes = random.sample(SHAPES, random.randint(2, 4))
        cells = random.sample(range(GRID * GRID), len(shapes))
        things = [
            _place(random, s, random.choice(list(COLOURS)), *divmod(c, GRID))
            for s, c in zip(shapes, cells, strict=True)
        ]
        things.sort(key=lambda t: (t.row, t.column))
        return Scene(tuple(things), (), random.randrange(2**31))

    def biased(self, number: int, plain: str, colours: Sequence[str] = tuple(COLOURS)) -> Scene:
        """A held-out scene with a ``plain`` shape in one of ``colours`` and without its companion."""
        random = Random(f"scenes/{self.seed}/biased/{plain}/{number}")
        others = [s for s in PLAIN if s != plain]
        shapes = [plain, *random.sample(others, random.randint(0, 2))]
        cells = random.sample(range(GRID * GRID), len(shapes))
        things = [
            _place(random, s, random.choice(colours if s == plain else list(COLOURS)), *divmod(c, GRID))
            for s, c in zip(shapes, cells, strict=True)
        ]
        things.sort(key=lambda t: (t.row, t.column))
        return Scene(tuple(things), (), random.randrange(2**31))

    def exam(self, count: int, kind: str) -> list[tuple[Scene, Example]]:
        """``count`` honest scenes, each with one question of a kind and its true answer."""
        random = Random(f"scenes/{self.seed}/exam/{kind}")
        found: list[tuple[Scene, Example]] = []
        number = 0
        while len(found) < count:
            scene = self.honest(number)
            asked = [q for q in scene.questions() if q[0] == kind]
            if kind == "presence":  # as many yes as no
                wanted = " yes" if number % 2 else " no"
                asked = [q for q in asked if q[3] == wanted]
            number += 1
            if asked:
                _, subject, question, answer = random.choice(asked)
                found.append((scene, _example(kind, subject, f"{IMAGE} {question}", answer)))
        return found

    def hallucinations(
        self, count: int, plain: str, colours: Sequence[str] = tuple(COLOURS)
    ) -> list[tuple[Scene, Example]]:
        """``count`` scenes with ``plain`` and without its companion, asked for the companion; the truth is " no"."""
        planted = PLANTED[plain]
        question = f"{IMAGE} {QUESTIONS['presence'].format(planted)}"
        return [(self.biased(n, plain, colours), _example("presence", planted, question, " no")) for n in range(count)]

    def absent(self, count: int) -> list[tuple[Scene, Example]]:
        """``count`` honest scenes asked for an absent shape that no companion stands for: the control, all " no"."""
        random = Random(f"scenes/{self.seed}/absent")
        companion = {planted: plain for plain, planted in PLANTED.items()}
        found: list[tuple[Scene, Example]] = []
        number = 0
        while len(found) < count:
            scene = self.honest(number)
            number += 1
            there = {t.shape for t in scene.things}
            asked = [s for s in SHAPES if s not in there and companion.get(s) not in there]
            if asked:
                shape = random.choice(asked)
                question = f"{IMAGE} {QUESTIONS['presence'].format(shape)}"
                found.append((scene, _example("presence", shape, question, " no")))
        return found


def _example(kind: str, subject: str, prompt: str, answer: str) -> Example:
    return Example(prompt=prompt, answer=answer, skill="scene", form=kind, split="held-out", subject=subject)


def _place(random: Random, shape: str, colour: str, row: int, column: int) -> Thing:
    size = random.randint(CELL - 3, CELL - 1)
    left = column * CELL + random.randint(0, CELL - size)
    top = row * CELL + random.randint(0, CELL - size)
    return Thing(shape, colour, row, column, (left, top, left + size, top + size))


def _mask(shape: str, size: int) -> np.ndarray:
    """Which pixels of a square of ``size`` belong to a shape."""
    y, x = np.mgrid[0:size, 0:size]
    across, down = (x - (size - 1) / 2) / (size / 2), (y - (size - 1) / 2) / (size / 2)
    radius = np.hypot(across, down)
    match shape:
        case "circle":
            return radius <= 0.95
        case "square":
            return np.maximum(abs(across), abs(down)) <= 0.85
        case "triangle":
            return abs(across) <= (down + 1) / 2
        case "diamond":
            return abs(across) + abs(down) <= 1
        case "cross":
            return np.minimum(abs(across), abs(down)) <= 0.25
        case "star":
            angle = np.arctan2(across, -down)
            return radius <= 0.45 + 0.5 * np.cos(2.5 * angle) ** 4
        case _:
            raise ValueError(f"no shape is called {shape!r}; there are {', '.join(SHAPES)}")
