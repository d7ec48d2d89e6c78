"""Associative recall: pairs of key and value, then a key; what follows is the value that stood behind it."""

from __future__ import annotations

from random import Random

from .examples import Example, Pair, Split

KEYS = tuple("abcdefghijklmnopqrst")
VALUES = tuple("ABCDEFGHIJKLMNOPQRST")


def recall(count: int, *, seed: int = 0, pairs: int = 6, split: Split = "held-out") -> list[Example]:
    """``count`` prompts such as "c F a B q A c", answered " F"; keys and values of a prompt are all different.

    Args:
        seed, split: the two splits never share their random numbers.
        pairs: pairs before the question, at most 20.
    """
    random = Random(f"recall/{seed}/{pairs}/{split}")
    found = []
    for _ in range(count):
        keys, values = random.sample(KEYS, pairs), random.sample(VALUES, pairs)
        asked = random.randrange(pairs)
        shown = " ".join(f"{k} {v}" for k, v in zip(keys, values, strict=True))
        found.append(
            Example(
                prompt=f"{shown} {keys[asked]}",
                answer=f" {values[asked]}",
                skill="recall",
                form=f"{pairs} pairs",
                split=split,
                subject=keys[asked],
            )
        )
    return found


def recall_pairs(count: int, *, seed: int = 0, pairs: int = 6) -> list[Pair]:
    """Prompts that differ in the key that is asked alone, so clean and corrupt are of equal length."""
    random = Random(f"recall pairs/{seed}/{pairs}")
    found = []
    for clean in recall(count, seed=seed, pairs=pairs):
        *shown, asked = clean.prompt.split()
        other = random.choice([i for i in range(0, len(shown), 2) if shown[i] != asked])
        corrupt = Example(
            prompt=" ".join((*shown, shown[other])),
            answer=f" {shown[other + 1]}",
            skill="recall",
            form=clean.form,
            split=clean.split,
            subject=shown[other],
        )
        found.append(Pair(clean=clean, corrupt=corrupt))
    return found
