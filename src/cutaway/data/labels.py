"""In-context classification with labels that mean nothing: "cat foo ; pear bar ; dog" is followed by "foo"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from .examples import Example, Pair, Split

CATEGORIES = {
    "animal": "cat dog cow pig hen fox owl bee ant rat bat elk yak emu ape bear",
    "fruit": "pear plum fig lime kiwi date apple grape lemon mango melon peach cherry guava papaya olive",
    "tool": "saw axe hammer wrench drill rake shovel chisel pliers level clamp file mallet spade hoe plane",
    "dress": "hat coat scarf glove sock shoe boot shirt skirt belt vest jacket cap tie cape robe",
    "vehicle": "car bus van truck train tram plough boat ship canoe raft bike cart sled taxi ferry",
    "metal": "iron tin zinc lead copper nickel brass steel silver bronze cobalt chrome mercury tungsten titanium "
    "radium",
    "kin": "aunt uncle mother father sister brother cousin niece nephew son daughter wife husband twin widow heir",
    "weather": "rain snow hail fog wind storm frost mist sleet thunder breeze drizzle gale cloud shower blizzard",
}
LABELS = (
    "foo bar baz qux dax wug fep zorp blick toma kiki bouba lorp vash mip nolt grix hask jund pell quon rask sorn teff "
    "ulm vork wex yost zim brun clat drov ekk flim gorp hulm inx jalp kref lunt marp nink opsi prax quib rondo stip"
).split()


@dataclass(frozen=True, slots=True)
class Shot:
    """A word, its category and the label that stands behind it."""

    word: str
    category: str
    label: str


@dataclass(frozen=True)
class Labels:
    """The world of the labels: categories of words, and which words and labels are held out.

    A held-out word is never followed by a meaningless label in training, only by its category's name; a held-out
    label never stands behind a word at all (its token is known from text that repeats itself).

    Args:
        seed: draws the splits.
        held_out_words: words of each category that are held out.
        held_out_labels: labels that are held out.
    """

    seed: int = 0
    held_out_words: int = 3
    held_out_labels: int = 10

    def words(self, category: str, split: Split) -> list[str]:
        """The words of a category in a split, in alphabetical order."""
        every = sorted(CATEGORIES[category].split())
        hidden = set(Random(f"labels/{self.seed}/{category}").sample(every, self.held_out_words))
        return [w for w in every if (w in hidden) == (split == "held-out")]

    def labels(self, split: Split) -> list[str]:
        """The label words of a split, in alphabetical order."""
        hidden = set(Random(f"labels/{self.seed}/labels").sample(sorted(LABELS), self.held_out_labels))
        return [w for w in sorted(LABELS) if (w in hidden) == (split == "held-out")]

    def vocabulary(self) -> list[str]:
        """Every word, label and sign of the world, once."""
        words = [w for members in CATEGORIES.values() for w in members.split()]
        return list(dict.fromkeys([";", *CATEGORIES, *words, *LABELS]))

    def shots(
        self, random: Random, count: int, *, words: Split = "train", labels: Split = "train", named: bool = False
    ) -> list[Shot]:
        """``count`` shots of two categories with a label each, as even as can be, in random order.

        Args:
            named: label each category with its own name; then every word may come, held out or not.
        """
        categories = random.sample(sorted(CATEGORIES), 2)
        tags = categories if named else random.sample(self.labels(labels), 2)
        first = random.randrange(2)
        sides = [(first + i) % 2 for i in range(count)]
        random.shuffle(sides)
        pools = [CATEGORIES[c].split() if named else self.words(c, words) for c in categories]
        if not named and words == "held-out":  # too few to fill the shots: only the question has to be new
            pools = [self.words(c, "train") for c in categories]
        drawn = [random.sample(pool, min(len(pool), count)) for pool in pools]
        return [Shot(drawn[s][i % len(drawn[s])], categories[s], tags[s]) for i, s in enumerate(sides)]

    def examples(
        self, count: int, *, shots: int = 8, words: Split = "train", labels: Split = "train", seed: int = 0
    ) -> list[Example]:
        """``count`` prompts of ``shots`` labelled words and a question that was not shown, answered by its label.

        Args:
            words: whether the word asked about was held out.
            labels: whether the labels were held out.
        """
        random = Random(f"labels/{self.seed}/{seed}/{shots}/{words}/{labels}")
        found = []
        for _ in range(count):
            shown = self.shots(random, shots, words=words, labels=labels)
            kind = random.choice(shown)
            new = sorted(set(self.words(kind.category, words)) - {s.word for s in shown})
            found.append(_example(shown, random.choice(new), kind.label, words, labels))
        return found

    def pairs(self, count: int, *, shots: int = 8, seed: int = 0) -> list[Pair]:
        """Prompts that differ in the word asked alone, of the one category and of the other."""
        random = Random(f"labels pairs/{self.seed}/{seed}/{shots}")
        found = []
        for _ in range(count):
            shown = self.shots(random, shots)
            sides = list({s.category: s.label for s in shown}.items())
            random.shuffle(sides)
            clean, corrupt = (
                _example(
                    shown,
                    random.choice(sorted(set(self.words(category, "train")) - {s.word for s in shown})),
                    label,
                    "train",
                    "train",
                )
                for category, label in sides
            )
            found.append(Pair(clean=clean, corrupt=corrupt))
        return found


def _example(shown: Sequence[Shot], word: str, label: str, words: Split, labels: Split) -> Example:
    return Example(
        prompt=" ".join(f"{s.word} {s.label} ;" for s in shown) + f" {word}",
        answer=f" {label}",
        skill="label",
        form=f"{len(shown)} shots",
        split="held-out" if "held-out" in (words, labels) else "train",
        subject=word,
    )
