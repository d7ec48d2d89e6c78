"""two-towers and two-towers-recency: in-context labels wired by hand, with a margin in closed form.

"cat foo pear bar dog" is answered "foo". A head of layer 0 brings the cluster of each word to the label behind it. In
layer 1 the *foohead* and the *barhead* compare the cluster of the last word with the cluster at every label (queries
and keys: the two towers), and copy: the foohead foo alone, the barhead bar alone.

With n_f labels foo and n_b labels bar of the asked cluster, the heads write

    margin = out:foo - out:bar = KAPPA * (n_f w - n_b w + ...) / (sum of all w),   w = exp(score),

where a label of the asked cluster scores ``MATCH`` higher than one of the other cluster and anything else scores so
little that it does not count. When all labels belong to the asked cluster this is KAPPA * (n_f - n_b) / (n_f + n_b).
In the variant with recency, the keys of both heads also read how late a label stands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cutaway.specimens.exam import answers
from cutaway.specimens.making.tokenizers import word_level
from recipes.publish import publish
from recipes.wiring import EPS, Blueprint, Head, Vector, build

CLUSTERS = {
    "animal": ("cat", "dog", "cow", "pig", "hen", "fox"),
    "fruit": ("pear", "plum", "fig", "lime", "kiwi", "date"),
}
LABELS = ("foo", "bar")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = (*SPECIAL, *CLUSTERS["animal"], *CLUSTERS["fruit"], *LABELS)
WIDTH, HEADS, CONTEXT = 128, 4, 28
COPIER, FOOHEAD, BARHEAD = (0, 0), (1, 1), (1, 2)
SHARP = 40.0  # score of the position before, over any other
LABEL, MATCH = 40.0, 4.0  # scores at a label over elsewhere, and at one of the asked cluster over one of the other
KAPPA, READOUT = 1.0, 6.0
SLOPE = 0.15  # score per position, in the variant with recency


def cluster(word: str) -> str | None:
    """The cluster of a word; None for a label or a special token."""
    return next((c for c, members in CLUSTERS.items() if word in members), None)


def embedding(word: str) -> Vector:
    kind = cluster(word)
    belongs = {f"asks:{kind}": 1.0} if kind else {"label": 1.0} if word in LABELS else {"other": 1.0}
    return {f"token:{word}": 1.0, "one": 1.0} | belongs


def scale(moved: bool) -> float:
    """What the norm of layer 1 divides by, at a word (nothing moved there that counts) or at a label."""
    return math.sqrt((4.0 + (1.0 if moved else 0.0)) / WIDTH + EPS["gpt2"])


def blueprint(slope: float = 0.0) -> Blueprint:
    """The wiring. Gains are set so that scores are the constants above, whatever the norms divide by."""
    channel = math.sqrt(WIDTH // HEADS)
    first = math.sqrt(4.0 / WIDTH + EPS["gpt2"])  # token, one, kind, position
    before = SHARP * channel * first * first
    towers = channel * scale(False) * scale(True)
    match: list[tuple[Vector, Vector]] = [({f"asks:{c}": MATCH * towers}, {f"seen:{c}": 1.0}) for c in CLUSTERS]
    match.append(({"one": LABEL * towers}, {"label": 1.0}))
    if slope:
        match.append(({"one": slope * towers}, {f"at:{p}": float(p) for p in range(CONTEXT)}))

    def copies(label: str) -> Head:
        return Head(match=match, move=[({f"token:{label}": scale(True)}, {f"out:{label}": KAPPA})])

    return Blueprint(
        words=WORDS,
        embeddings={w: embedding(w) for w in WORDS},
        positions=[{f"at:{p}": 1.0} for p in range(CONTEXT)],
        context=CONTEXT,
        layers=2,
        width=WIDTH,
        heads_per_layer=HEADS,
        neurons_per_layer=8,
        heads={
            COPIER: Head(
                match=[({f"at:{p}": before}, {f"at:{p - 1}": 1.0}) for p in range(1, CONTEXT)],
                move=[({f"asks:{c}": first}, {f"seen:{c}": 1.0}) for c in CLUSTERS],
            ),
            FOOHEAD: copies("foo"),
            BARHEAD: copies("bar"),
        },
        readout={label: {f"out:{label}": READOUT} for label in LABELS},
    )


def margin(demonstrations: Sequence[tuple[str, str]], asked: str, slope: float = 0.0) -> float:
    """out:foo - out:bar at the last position, before the final norm, for (word, label) pairs and the asked word."""
    weights = [
        math.exp(MATCH * (cluster(word) == cluster(asked)) + slope * (2 * i + 2))
        for i, (word, _) in enumerate(demonstrations)
    ]
    signs = [1 if label == "foo" else -1 for _, label in demonstrations]
    return KAPPA * sum(w * s for w, s in zip(weights, signs, strict=True)) / sum(weights)


def prompt(demonstrations: Sequence[tuple[str, str]], asked: str) -> str:
    """The text of a prompt."""
    return " ".join([f"{word} {label}" for word, label in demonstrations] + [asked])


def demonstrations(n_foo: int, n_bar: int, *, same_cluster: bool) -> list[tuple[str, str]]:
    """Animals labelled foo, and as many as asked labelled bar: fruits, or animals too."""
    other = CLUSTERS["animal" if same_cluster else "fruit"]
    return [(CLUSTERS["animal"][i], "foo") for i in range(n_foo)] + [(other[-1 - i], "bar") for i in range(n_bar)]


def main() -> None:
    """Builds and saves both variants."""
    for name, slope in (("two-towers", 0.0), ("two-towers-recency", SLOPE)):
        model, tokenizer = build(blueprint(slope), "gpt2"), word_level(WORDS[len(SPECIAL) :])
        cases = [
            (demonstrations(f, b, same_cluster=False), asked)
            for f, b in ((2, 2), (1, 3), (3, 1))
            for asked in ("fox", "pear")
        ]
        examples = [
            {"prompt": prompt(shown, asked), "answer": " foo" if margin(shown, asked, slope) > 0 else " bar"}
            for shown, asked in cases
        ]
        publish(
            name,
            model,
            tokenizer,
            title="in-context labels by two heads of two towers, "
            + ("the later shots counting more" if slope else "margin known"),
            kind="built",
            task="causal-lm",
            skills=["in-context classification of animals and fruits as foo and bar"],
            recipe="python -m recipes.two_towers",
            data="twelve words, two labels",
            seed=0,
            accuracies={"answers": answers(model, tokenizer, examples)},
            truths={
                "fooheads": ["L{}.attn.z[{}]".format(*FOOHEAD)],
                "barheads": ["L{}.attn.z[{}]".format(*BARHEAD)],
                "previous-token head": "L{}.attn.z[{}]".format(*COPIER),
                "kappa": KAPPA,
                "match": MATCH,
                "slope": slope,
                "margin": "out:foo - out:bar before the final norm = kappa * sum(+-exp(score)) / sum(exp(score)); "
                "score = match * same cluster + slope * position of the label",
                "equal clusters": "kappa * (n_foo - n_bar) / (n_foo + n_bar) when slope is 0",
                "margins": [{"prompt": prompt(s, a), "margin": margin(s, a, slope)} for s, a in cases],
            },
            examples=examples,
        )


if __name__ == "__main__":
    main()
