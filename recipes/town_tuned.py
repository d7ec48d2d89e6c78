"""town-tuned: town after it read about new people, with its old facts visibly worse (under a minute)."""

from __future__ import annotations

from cutaway import specimens
from cutaway.data import Town
from cutaway.specimens.making import text, tuned
from cutaway.specimens.making.plans import plan
from recipes import publish


def main() -> None:
    """Tunes the town that is shipped, records how far each tensor moved, and saves."""
    world = Town()
    made = plan("town-tuned")
    model, tokenizer = made.model, made.tokenizer
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    figures = tuned.accuracies(model, tokenizer, world)
    training = publish.run("town-tuned", model, made.stages)
    moved = {
        name: round(((tensor - before[name]).norm() / before[name].norm()).item(), 5)
        for name, tensor in model.state_dict().items()
    }
    told = tuned.exam(world)["new facts as told"]
    right = text.correct(model, tokenizer, told)
    shown = [e for e, ok in zip(told, right, strict=True) if ok][::20]
    publish.publish(
        "town-tuned",
        model,
        tokenizer,
        title=f"town after reading one statement per fact about {tuned.NEW_PEOPLE} new people: old facts suffer",
        kind="trained",
        task="causal-lm",
        skills=["facts about new people", "forgetting of old ones"],
        recipe="python -m recipes.town_tuned",
        data=f"cutaway.data.Town(seed=0).newcomers({tuned.NEW_PEOPLE}), form 0 of each fact",
        seed=tuned.SEED,
        accuracies=tuned.accuracies(model, tokenizer, world),
        truths={
            "base": "town",
            "base sha256": specimens.card("town").sha256,
            "accuracies of the base": figures,
            "new people": [p.name for p in tuned.newcomers(world)],
            "relative change of each tensor (Frobenius norm)": moved,
        },
        examples=[{"prompt": e.prompt, "answer": e.answer} for e in shown],
        notes=["Full fine-tuning of every tensor: the deltas are town-tuned minus town, nothing is low-rank."],
        training=training,
    )


if __name__ == "__main__":
    main()
