"""What every generator returns: a prompt with its answer, and pairs of prompts that differ in one thing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "held-out"]
TokenCount = Callable[[str], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt and the text that should follow it.

    Attributes:
        prompt: the text given, without a trailing space.
        answer: the text that follows, with its leading space (" Alder"), so that ``prompt + answer`` is the sentence.
        skill: what it tests ("fact", "two-hop", "sum", ...).
        form: the template it was written with ("city/0").
        split: "train" if a specimen trained on it, "held-out" if never.
        subject: the words that the answer depends on, as they stand in the prompt; "" when it is the whole prompt.
        weight: how often the training text repeats it, relative to its neighbours.
    """

    prompt: str
    answer: str
    skill: str
    form: str
    split: Split = "train"
    subject: str = ""
    weight: float = 1.0

    @property
    def text(self) -> str:
        """Prompt, answer and full stop: the sentence as a specimen reads it in training."""
        return f"{self.prompt}{self.answer}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A clean and a corrupt example of one form whose answers differ: what activation patching starts from."""

    clean: Example
    corrupt: Example


def select(
    examples: Iterable[Example], *, skill: str | None = None, form: str | None = None, split: Split | None = None
) -> list[Example]:
    """The examples of a skill, of a form (or of all forms of a relation: ``"city"``) and of a split, in order."""
    return [
        e
        for e in examples
        if (skill is None or e.skill == skill)
        and (form is None or e.form == form or e.form.startswith(f"{form}/"))
        and (split is None or e.split == split)
    ]


def pair_up(examples: Sequence[Example], length: TokenCount | None = None) -> list[Pair]:
    """Each example with the next one of the same form, another answer and, given ``length``, as many tokens.

    Args:
        examples: candidates, in the order in which they are matched.
        length: number of tokens of a text, for example ``lambda t: len(tokenizer(t).input_ids)``. Without it
            the prompts are matched by their number of words.

    Returns:
        Pairs in the order of their clean examples; examples without a partner are left out.
    """
    count = length if length is not None else lambda text: len(text.split())
    groups: dict[tuple[str, int], list[Example]] = {}
    places = []
    for example in examples:
        group = groups.setdefault((example.form, count(example.prompt)), [])
        places.append((group, len(group)))
        group.append(example)
    pairs = []
    for example, (group, at) in zip(examples, places, strict=True):
        others = (group[(at + step) % len(group)] for step in range(1, len(group)))
        partner = next((other for other in others if other.answer != example.answer), None)
        if partner is not None:
            pairs.append(Pair(clean=example, corrupt=partner))
    return pairs
