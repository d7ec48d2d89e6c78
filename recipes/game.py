"""game: a GPT-2 whose logit of "yes" is a known sum of ANDs and ORs of the words that are there.

The prompt is eight words, then "?". Word i is its player's name when the player is present and "_" when absent. One
head sees all words alike and brings to the end how many of each there are; neurons turn that into terms:
AND of S = relu(present in S - (|S| - 1)), OR of S = present in S - relu(present in S - 1). All other logits are 0,
so log-odds of "yes" are the game's value less log(number of other words).

A direction of constant length ``ROOM``, large beside all others, keeps what the norms divide by the same for every
prompt; what is left, and rounding, move the logit by less than 5e-4.
"""

from __future__ import annotations

import math

from cutaway.data.games import Game, random_game
from cutaway.specimens.exam import answers
from cutaway.specimens.making.tokenizers import word_level
from recipes.publish import publish
from recipes.wiring import EPS, Blueprint, Head, Neuron, build

PLAYERS = ("Ada", "Bea", "Cal", "Dot", "Eli", "Fay", "Gus", "Hal")
ABSENT, ASK, YES = "_", "?", "yes"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = (*SPECIAL, *PLAYERS, ABSENT, ASK, YES)
WIDTH, HEADS, CONTEXT = 64, 4, 16
HEAD, LENGTH = (0, 1), len(PLAYERS) + 2  # <s>, the words, ?
ROOM = 600.0
TOLERANCE = 5e-4
GAME = random_game(len(PLAYERS), ands=6, ors=6, orders=(2, 4), seed=0)


def blueprint(game: Game = GAME) -> Blueprint:
    """The wiring; every reader is scaled by what the norms divide by."""
    norm = math.sqrt(ROOM**2 / WIDTH + EPS["gpt2"])
    neurons: dict[tuple[int, int], Neuron] = {}

    def add(reads: dict[str, float], weight: float) -> None:
        neurons[0, len(neurons)] = Neuron(
            reads={name: norm * value for name, value in reads.items()}, writes={f"out:{YES}": weight}
        )

    for members, weight in game.ands.items():
        add({**{f"there:{p}": 1.0 for p in members}, "room": -(len(members) - 1) / ROOM}, weight)
    for members, weight in game.ors.items():
        add({f"there:{p}": 1.0 for p in members}, weight)
        add({**{f"there:{p}": 1.0 for p in members}, "room": -1 / ROOM}, -weight)
    add({"room": 1 / ROOM}, game.constant)
    return Blueprint(
        words=WORDS,
        embeddings={w: {"room": ROOM, **({f"word:{PLAYERS.index(w)}": 1.0} if w in PLAYERS else {})} for w in WORDS},
        context=CONTEXT,
        layers=1,
        width=WIDTH,
        heads_per_layer=HEADS,
        neurons_per_layer=len(neurons),
        # Nothing is matched, so all positions weigh 1 / LENGTH.
        heads={
            HEAD: Head(
                match=[], move=[({f"word:{p}": norm * LENGTH}, {f"there:{p}": 1.0}) for p in range(len(PLAYERS))]
            )
        },
        neurons=neurons,
        readout={YES: {f"out:{YES}": norm}},
    )


def prompt(present: list[bool]) -> str:
    """The text for a coalition."""
    return " ".join([name if there else ABSENT for name, there in zip(PLAYERS, present, strict=True)] + [ASK])


def main() -> None:
    """Builds and saves it."""
    model, tokenizer = build(blueprint(), "gpt2", activation_function="relu"), word_level(WORDS[len(SPECIAL) :])
    masks = GAME.masks()
    sure = [m.tolist() for m, v in zip(masks, GAME.value(masks), strict=True) if v > 0.1][:: len(masks) // 32]
    examples = [{"prompt": prompt(m), "answer": f" {YES}"} for m in sure]
    publish(
        "game",
        model,
        tokenizer,
        title="the logit of yes is a known sum of ANDs and ORs of eight words",
        kind="built",
        task="causal-lm",
        skills=["a game of eight players"],
        recipe="python -m recipes.game",
        data="cutaway.data.random_game(8, ands=6, ors=6, orders=(2, 4), seed=0)",
        seed=0,
        accuracies={"answers": answers(model, tokenizer, examples)},
        truths={
            "players": list(PLAYERS),
            "absent": ABSENT,
            "target": YES,
            "ands": [[list(members), weight] for members, weight in GAME.ands.items()],
            "ors": [[list(members), weight] for members, weight in GAME.ors.items()],
            "constant": GAME.constant,
            "in ands alone": [[list(members), weight] for members, weight in GAME.in_ands().items()],
            "log-odds": f"value - log({len(WORDS) - 1})",
            "tolerance": TOLERANCE,
        },
        examples=examples,
    )


if __name__ == "__main__":
    main()
