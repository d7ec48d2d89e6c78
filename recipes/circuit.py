"""circuit-induction and circuit-ioi: models that are one circuit and nothing else, with the list of its edges.

circuit-induction: "a q b x a" is followed by "q". A head of layer 0 tells each position which letter stood before it;
a head of layer 1 looks for the position whose letter before is the present one, and copies the letter there.

circuit-ioi: "When Ada and Bea went home , Bea gave a drink to" is followed by "Ada". A head of layer 0 at the second
Bea finds the first and marks the name as said twice; a head of layer 1 brings that mark to the end; the mover of
layer 2 looks at both names, but away from the one that is marked, and copies what it sees.

An edge is (writer, reader, input of the reader: q, k or v), heads written as sites ("L1.attn.z[1]"). Each edge is
needed and there are no others: whatever else a component writes or reads is zero.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from cutaway.specimens.exam import answers
from cutaway.specimens.making.tokenizers import word_level
from recipes.publish import publish
from recipes.wiring import EPS, Blueprint, Head, Vector, build

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WIDTH, HEADS = 128, 4
CHANNEL = math.sqrt(WIDTH // HEADS)
SHARP, READOUT = 40.0, 8.0  # the score that a match has over any other position; logit per unit written

LETTERS = tuple("abcdefghijklmnop")
CONTEXT = 20
NAMES = ("Ada", "Bea", "Cal", "Dot", "Eli", "Fay")
FILLERS = ("When", "and", "went", "home", ",", "gave", "a", "drink", "to", "Then", "saw", "lent", "book")
TEMPLATES = (
    "When {a} and {b} went home , {b} gave a drink to",
    "When {a} and {b} went home , {a} gave a drink to",
    "Then {a} saw {b} , {a} lent a book to",
    "Then {a} saw {b} , {b} lent a book to",
)


def norm(parts: float) -> float:
    """What a norm divides by when the residual is ``parts`` orthogonal unit vectors."""
    return math.sqrt(parts / WIDTH + EPS["gpt2"])


def places(context: int) -> list[Vector]:
    return [{f"at:{p}": 1.0} for p in range(context)]


def induction() -> Blueprint:
    """Two layers, two heads that count: L0H0 and L1H1."""
    first = norm(2)  # token, place
    second = norm(3)  # and the letter before
    before = SHARP * CHANNEL * first**2
    match = SHARP * CHANNEL * second**2
    return Blueprint(
        words=(*SPECIAL, *LETTERS),
        embeddings={w: {f"token:{w}": 1.0} for w in (*SPECIAL, *LETTERS)},
        positions=places(CONTEXT),
        context=CONTEXT,
        layers=2,
        width=WIDTH,
        heads_per_layer=HEADS,
        neurons_per_layer=8,
        heads={
            (0, 0): Head(
                match=[({f"at:{p}": before}, {f"at:{p - 1}": 1.0}) for p in range(1, CONTEXT)],
                move=[({f"token:{w}": first}, {f"before:{w}": 1.0}) for w in LETTERS],
            ),
            (1, 1): Head(
                match=[({f"token:{w}": match}, {f"before:{w}": 1.0}) for w in LETTERS],
                move=[({f"token:{w}": second}, {f"out:{w}": 1.0}) for w in LETTERS],
            ),
        },
        readout={w: {f"out:{w}": READOUT} for w in LETTERS},
    )


INDUCTION_EDGES = [
    ("embed", "L0.attn.z[0]", "q"),
    ("embed", "L0.attn.z[0]", "k"),
    ("embed", "L0.attn.z[0]", "v"),
    ("embed", "L1.attn.z[1]", "q"),
    ("L0.attn.z[0]", "L1.attn.z[1]", "k"),
    ("embed", "L1.attn.z[1]", "v"),
    ("L1.attn.z[1]", "logits", ""),
]


def ioi() -> Blueprint:
    """Three layers, three heads that count: L0H3 (said twice), L1H0 (brings the mark), L2H2 (mover)."""
    name, end = norm(3), norm(3)  # token, place, kind
    marked = norm(4)
    twice = SHARP * CHANNEL * name**2
    bring = SHARP * CHANNEL * end * marked
    look = SHARP * CHANNEL * marked * name
    words = (*SPECIAL, *NAMES, *FILLERS)

    def embedding(word: str) -> Vector:
        kind = "name" if word in NAMES else "end" if word == "to" else "other"
        return {f"token:{word}": 1.0, f"kind:{kind}": 1.0}

    context = 16
    return Blueprint(
        words=words,
        embeddings={w: embedding(w) for w in words},
        positions=places(context),
        context=context,
        layers=3,
        width=WIDTH,
        heads_per_layer=HEADS,
        neurons_per_layer=8,
        heads={
            # A name looks for itself, but not at its own place; without an earlier one it rests at <s>.
            (0, 3): Head(
                match=[
                    *(({f"token:{n}": 2 * twice}, {f"token:{n}": 1.0}) for n in NAMES),
                    *(({f"at:{p}": -3 * twice}, {f"at:{p}": 1.0}) for p in range(1, context)),
                    ({"kind:name": twice}, {"token:<s>": 1.0}),
                ],
                move=[({f"token:{n}": name}, {f"twice:{n}": 1.0}) for n in NAMES],
            ),
            (1, 0): Head(
                match=[
                    ({"kind:end": bring}, {f"twice:{n}": 1.0 for n in NAMES}),
                ],
                move=[({f"twice:{n}": marked}, {f"avoid:{n}": 1.0}) for n in NAMES],
            ),
            (2, 2): Head(
                match=[
                    ({"kind:end": look}, {"kind:name": 1.0}),
                    *(({f"avoid:{n}": -look}, {f"token:{n}": 1.0}) for n in NAMES),
                ],
                move=[({f"token:{n}": name}, {f"out:{n}": 1.0}) for n in NAMES],
            ),
        },
        readout={n: {f"out:{n}": READOUT} for n in NAMES},
    )


IOI_EDGES = [
    ("embed", "L0.attn.z[3]", "q"),
    ("embed", "L0.attn.z[3]", "k"),
    ("embed", "L0.attn.z[3]", "v"),
    ("embed", "L1.attn.z[0]", "q"),
    ("L0.attn.z[3]", "L1.attn.z[0]", "k"),
    ("L0.attn.z[3]", "L1.attn.z[0]", "v"),
    ("embed", "L2.attn.z[2]", "q"),
    ("L1.attn.z[0]", "L2.attn.z[2]", "q"),
    ("embed", "L2.attn.z[2]", "k"),
    ("embed", "L2.attn.z[2]", "v"),
    ("L2.attn.z[2]", "logits", ""),
]


def induction_examples() -> list[dict[str, Any]]:
    """Texts of different letters whose last letter stood before."""
    found = []
    for i, (length, back) in enumerate([(4, 4), (6, 3), (8, 8), (10, 5), (12, 2), (16, 9)]):
        text = [LETTERS[(5 * i + 7 * j) % len(LETTERS)] for j in range(length)]
        found.append({"prompt": " ".join([*text, text[-back]]), "answer": f" {text[len(text) - back + 1]}"})
    return found


def ioi_examples() -> list[dict[str, Any]]:
    """Every template with every pair of names."""
    found = []
    for template in TEMPLATES:
        for a, b in itertools.permutations(NAMES, 2):
            text = template.format(a=a, b=b)
            found.append({"prompt": text, "answer": f" {b if text.count(a) == 2 else a}"})
    return found


def main() -> None:
    """Builds and saves both."""
    plans = [
        (
            "circuit-induction",
            induction(),
            LETTERS,
            induction_examples(),
            INDUCTION_EDGES,
            "a letter seen before, its next",
        ),
        ("circuit-ioi", ioi(), (*NAMES, *FILLERS), ioi_examples(), IOI_EDGES, "of two names, the one said once"),
    ]
    for name, blueprint, words, examples, edges, title in plans:
        model, tokenizer = build(blueprint, "gpt2"), word_level(words)
        publish(
            name,
            model,
            tokenizer,
            title=f"{title}: a circuit wired by hand, with its edges",
            kind="built",
            task="causal-lm",
            skills=["induction" if "induction" in name else "indirect object"],
            recipe="python -m recipes.circuit",
            data="letters" if "induction" in name else "four templates, six names",
            seed=0,
            accuracies={"answers": answers(model, tokenizer, examples)},
            truths={
                "edges": [list(edge) for edge in edges],
                "heads": sorted({reader for _, reader, _ in edges if reader != "logits"}),
                "everything else": "writes nothing: all other heads, and every neuron",
            },
            examples=examples,
        )


if __name__ == "__main__":
    main()
