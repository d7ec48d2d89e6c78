"""recall-1 and recall-2: the same task, text and steps for one layer, which cannot do it, and for two, which can."""

from __future__ import annotations

from typing import Any

from cutaway.data import recall as examples
from cutaway.specimens.making import recall, text
from cutaway.specimens.making.plans import plan
from recipes import publish


def write(model: Any, tokenizer: Any, layers: int, training: dict[str, Any], **where: Any) -> None:
    """Publishes a trained model with its card."""
    asked = examples(40)
    right = text.correct(model, tokenizer, asked, stop="")
    shown = [e for e, ok in zip(asked, right, strict=True) if ok][:3]
    publish.publish(
        f"recall-{layers}",
        model,
        tokenizer,
        title=f"associative recall with {'one layer, which guesses' if layers == 1 else 'two layers, which know'}",
        kind="trained",
        task="causal-lm",
        skills=["associative recall"],
        recipe="python -m recipes.recall",
        data=f"cutaway.data.recall(count, pairs={recall.PAIRS})",
        seed=recall.SEED,
        accuracies=recall.accuracies(model, tokenizer),
        truths={
            "chance among the values shown": 1 / recall.PAIRS,
            "why": "the last key can find its value only if the value's position knows the key before it; "
            "one layer reads before that could be written",
        },
        examples=[{"prompt": e.prompt, "answer": e.answer} for e in shown],
        notes=["The examples are those it happens to get right; it stays near chance."] if layers == 1 else [],
        training=training,
        **where,
    )


def main() -> None:
    """Trains and saves both, on the same text for as many steps."""
    for layers in (1, 2):
        name = f"recall-{layers}"
        made = plan(name)
        write(made.model, made.tokenizer, layers, publish.run(name, made.model, made.stages))


if __name__ == "__main__":
    main()
