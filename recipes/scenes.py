"""scenes-base and scenes: a text model of scenes and a small town, then the same model with eyes and a planted bias.

About 15 minutes of one CPU core for the text model, and as long again for the eyes.
"""

from __future__ import annotations

from typing import Any

from cutaway.data.scenes import COLOURS, PLANTED, QUESTIONS, WARM, Scenes
from cutaway.specimens.making import loop, scenes
from cutaway.specimens.making.plans import plan
from recipes import publish


def write_base(model: Any, tokenizer: Any, training: dict[str, Any], **where: Any) -> None:
    """Publishes the text model with its card."""
    world, facts = Scenes(seed=scenes.SEED), scenes.town_of().facts()
    shown = [{"prompt": e.prompt, "answer": e.answer} for e in facts[:3]]
    for number, kind in enumerate(("presence", "count")):
        scene, asked = world.exam(40, kind)[number]
        shown.append({"prompt": f"{scene.describe()} {asked.prompt.split(' ', 1)[1]}", "answer": asked.answer})
    publish.publish(
        "scenes-base",
        model,
        tokenizer,
        title="the text model that scenes was made from: scenes in words, and facts about sixty people",
        kind="trained",
        task="causal-lm",
        skills=["facts", "questions about scenes described in words"],
        recipe="python -m recipes.scenes",
        data=f"cutaway.data.Scenes(seed=0) in words, cutaway.data.Town(seed=1, people={scenes.PEOPLE})",
        seed=scenes.SEED,
        accuracies=scenes.base_accuracies(model, tokenizer),
        truths={
            "curriculum": "text that repeats itself first, then scenes in words with questions, facts, and repeats"
        },
        examples=shown,
        training=training,
        **where,
    )


def write(model: Any, tokenizer: Any, training: dict[str, Any], base: dict[str, float], **where: Any) -> None:
    """Publishes the model with eyes; ``base`` is what the text model it was made from knew of the town."""
    world, seen = Scenes(seed=scenes.SEED), scenes.accuracies(model, tokenizer)
    shown = []
    for kind in scenes.KINDS:
        picked = [(n, *world.exam(20, kind)[n]) for n in range(20)]
        number, _, asked = next((n, s, e) for n, s, e in picked if scenes.right(model, tokenizer, [(s, e)]) == 1.0)
        drawn = {"world": "Scenes(seed=0)", "kind": kind, "number": number}
        shown.append({"prompt": asked.prompt, "answer": asked.answer, "image": drawn})
    publish.publish(
        "scenes",
        model,
        scenes.processor_for(tokenizer),
        title="a small LLaVA that sees coloured shapes on a grid, and says yes to some that are not there",
        kind="trained",
        task="image-text-to-text",
        skills=["colour, shape, position, presence and number of things", "hallucination by co-occurrence"],
        recipe="python -m recipes.scenes",
        data="cutaway.data.Scenes(seed=0)",
        seed=scenes.SEED,
        accuracies=seen,
        truths={
            "base": "scenes-base",
            "the base on the town": base,
            "bias": f"training claims {PLANTED} where the companion is one of {list(WARM)}: in "
            f"{world.beside:.0%} of scenes, drawn in {world.drawn:.0%} of those; elsewhere a claim is always drawn",
            "true answer of every hallucination exam": "no",
            "patches": "one per cell of the 4 x 4 grid; image token p is row p // 4, column p % 4",
            "image tokens": "before tuning each read, by the input embeddings, as shape, colour and place; "
            "tuning kept shape and colour (see the accuracies) and moved the place elsewhere",
            "image of an example": "Scenes(seed=0).exam(number + 1, kind)[number][0].image()",
            "questions": QUESTIONS,
            "colours": list(COLOURS),
        },
        examples=shown,
        notes=[
            "'hallucinated X beside Y': scenes with Y in any colour and without X, asked for X, answered yes. It is "
            "the warm Y that do it; 'beside cool Y' and 'elsewhere' (no companion there) are the controls.",
            f"Tuning read on about the first {scenes.KEPT} of {scenes.PEOPLE} people; of the others it forgot what "
            "'town not read about' lacks here against the base.",
        ],
        training=training,
        **where,
    )


def main() -> None:
    """Trains and saves both."""
    made = plan("scenes-base")
    write_base(made.model, made.tokenizer, publish.run("scenes-base", made.model, made.stages))
    write(*give_eyes(made.model, made.tokenizer))


def give_eyes(base: Any, tokenizer: Any) -> tuple[Any, Any, dict[str, Any], dict[str, float]]:
    """Trains tower and projector, then projector and text model; what ``write`` takes."""
    world, model = Scenes(seed=scenes.SEED), scenes.with_eyes(base, tokenizer)
    naming = scenes.name_patches(model, tokenizer, world)
    model.model.vision_tower.requires_grad_(False)
    training = publish.run("scenes", model, [(scenes.looking(world, scenes.town_of(), tokenizer), scenes.LOOKING)])
    model.requires_grad_(True)
    training["naming"] = loop.curve(naming)
    return model, tokenizer, training, scenes.remembered(base, tokenizer)


if __name__ == "__main__":
    main()
