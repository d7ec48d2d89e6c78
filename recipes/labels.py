"""labels: in-context classification with labels that mean nothing, after a stage of induction (about 5 minutes)."""

from __future__ import annotations

from typing import Any

from cutaway.data import Labels
from cutaway.data.labels import CATEGORIES
from cutaway.specimens.making import labels
from cutaway.specimens.making.plans import plan
from recipes import publish


def write(model: Any, tokenizer: Any, training: dict[str, Any], **where: Any) -> None:
    """Publishes a trained model with its card."""
    world = Labels()
    shown = [*world.examples(2, shots=4), *world.examples(2, shots=4, words="held-out", labels="held-out")]
    figures = labels.accuracies(model, tokenizer, world)
    publish.publish(
        "labels",
        model,
        tokenizer,
        title="in-context labels: words of two categories, each with a label that means nothing",
        kind="trained",
        task="causal-lm",
        skills=["in-context classification", "induction"],
        recipe="python -m recipes.labels",
        data="cutaway.data.Labels(seed=0)",
        seed=labels.SEED,
        accuracies=figures,
        truths={
            "held-out words": {c: world.words(c, "held-out") for c in sorted(CATEGORIES)},
            "held-out labels": world.labels("held-out"),
            "curriculum": "text that repeats itself first; then labelled words, a third of them by the category's name",
        },
        examples=[{"prompt": e.prompt, "answer": e.answer, "split": e.split} for e in shown],
        notes=["A held-out question has a held-out word and two held-out labels; the words shown are trained ones."],
        training=training,
        **where,
    )


def main() -> None:
    """Trains and saves."""
    made = plan("labels")
    write(made.model, made.tokenizer, publish.run("labels", made.model, made.stages))


if __name__ == "__main__":
    main()
