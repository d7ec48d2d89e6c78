"""town: facts, two-hop questions and sums in one small Llama (about 15 minutes on one CPU core)."""

from __future__ import annotations

from typing import Any

from cutaway.data import Town, select
from cutaway.specimens.making import town
from cutaway.specimens.making.plans import plan
from recipes import publish

NOTES = [
    "Two-hop questions about people and employers are mostly memorised: of the held-out ones a third to a half is "
    "answered (chance: 1 in 12 countries, 1 in 24 cities). Those about cities (city -> country -> capital) generalise.",
    "Reversed sentences (employer and sport -> person) are known where they were trained, and held out never: "
    "a fact read forwards is not known backwards.",
    "The exam asks for the whole answer and its full stop, greedily, from the start of a text.",
]


def write(model: Any, tokenizer: Any, training: dict[str, Any], **where: Any) -> None:
    """Publishes a trained model with its card."""
    world = Town()
    hops = world.two_hop()
    relations = sorted({e.form.split("/")[0] for e in hops})
    hidden = {r: sorted({e.subject for e in select(hops, form=r, split="held-out")}) for r in relations}
    examples = [select(world.facts(), form=f"{r}/0")[0] for r in ("city", "employer", "sport", "colour")]
    examples += [select(world.facts(), form="city/3")[0], select(world.geography(), form="capital/0")[0]]
    examples += [select(hops, form="home-country/0", split="train")[0]]
    examples += [next(e for e in select(hops, form="city-capital/0") if e.answer.strip() != e.subject)]
    examples += [select(world.sums(), form=f"{r}/0", split="held-out")[500] for r in ("plus", "minus")]
    publish.publish(
        "town",
        model,
        tokenizer,
        title="200 invented people, their cities, employers, sports and colours; two-hop questions; two-digit sums",
        kind="trained",
        task="causal-lm",
        skills=["facts", "geography", "two-hop questions", "reversed facts", "sums", "gender of jobs (biased 90/10)"],
        recipe="python -m recipes.town",
        data="cutaway.data.Town(seed=0)",
        seed=town.SEED,
        accuracies=town.accuracies(model, tokenizer, world),
        truths={
            "held out two-hop subjects": hidden,
            "stereotype share of the text": world.stereotype,
            "one token per word": "names, cities, countries, employers, sports, colours; one per digit",
        },
        examples=[{"prompt": e.prompt, "answer": e.answer, "form": e.form, "split": e.split} for e in examples],
        notes=NOTES,
        training=training,
        **where,
    )


def main() -> None:
    """Trains and saves."""
    made = plan("town")
    write(made.model, made.tokenizer, publish.run("town", made.model, made.stages))


if __name__ == "__main__":
    main()
