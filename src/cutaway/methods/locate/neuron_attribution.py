"""Neuron attribution: what each layer, head and neuron adds to the log-probability of an answer."""

from __future__ import annotations

from typing import Literal

import torch

from cutaway.core.errors import ParameterError, UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.method import method
from cutaway.core.params import Count, DrawCount, Image, Prompt, Target
from cutaway.core.proof import Check
from cutaway.models.handle import Model
from cutaway.ops.draws import prove_best
from cutaway.ops.importance import Goal, Ranked, layer_scores, top_elements
from cutaway.ops.parts import Parts, take_apart, unpadded
from cutaway.ops.readout import Head
from cutaway.ops.watched import rounding
from cutaway.results.ranking import Ranking

LevelName = Literal["layer", "head", "head-position", "neuron", "attention-neuron"]
WORDS = {
    "layer": "sublayers",
    "head": "heads",
    "head-position": "heads by source position",
    "neuron": "FFN neurons",
    "attention-neuron": "attention neurons by source position",
}


@method(cites="yu2024neuron", example={"prompt": "#5 #9 #6 #7 #8", "k": 5})
def neuron_attribution(
    model: Model,
    prompt: Prompt,
    image: Image | None = None,
    target: Target | None = None,
    versus: Target | None = None,
    then: list[Target] | None = None,
    level: LevelName = "neuron",
    k: Count = 30,
    scale: Literal["final", "own", "none"] = "final",
    draws: DrawCount = 5,
    seed: int = 0,
) -> Ranking:
    """What each layer, head or neuron adds to the log-probability of the answer, in nats.

    The score of a component with vector v is ``log p(w | b + v) - log p(w | b)``, where b is the state that its layer
    reads, and p goes through the final norm with the scale it has at the end. Computed exactly for those shown; a bound
    certifies that no other belongs among them. The proof takes the top components away, at all positions, and
    compares the drop with random ones of the same layers.

    Source: Yu and Ananiadou (2024), "Neuron-level knowledge attribution in large language models", section 3.

    Args:
        prompt: text or token ids.
        image: an image that goes with the prompt.
        target: the token whose log-probability is explained; the model's own answer when it is not given.
        versus: a rival token: the score is then that of the logit difference.
        then: tokens that follow the target, teacher-forced; scores are summed over all of them.
        level: what is ranked: sublayers, heads, what heads bring from each position, FFN neurons, or attention neurons
            (one channel of a head, from one position).
        k: how many are shown.
        scale: of the final norm: of the last state for everything (scores then come from one sum), of every state by
            itself (as the logit lens does), or none.
        draws: random draws of the proof, at least 5; 0 leaves it out.
        seed: of the draws.

    Returns:
        the k components that add most, with their first-order bound, coefficient and source position.

    Raises:
        UnsupportedError: layers that do not add to the residual stream, or a readout that is not understood.
        ParameterError: ``then`` together with ``versus``, or without a target.
    """
    batch = unpadded(model.inputs(prompt, image))
    if versus is not None and then:
        raise ParameterError("parameter 'versus'", "'then' is given too", "contrast one token at a time")
    if target is None and then:
        raise ParameterError("parameter 'then'", "no target is given", "name the target that it follows")
    ahead = [target, *(then or ())][:-1] if target is not None else []
    run = batch.extend(ahead, [model.decode(i) for i in ahead]) if ahead else batch
    parts = take_apart(model, run, len(ahead) + 1, level)
    ids = [int(parts.logits[0].argmax())] if target is None else [target, *(then or ())]
    head = Head(model)
    goal = Goal.of(head.frozen(parts.final, parts.logits, scale), ids, versus)
    if level == "layer":
        found, check, notes = _layers(model, parts, goal, k)
    else:
        found, check, notes = _elements(model, parts, goal, k, level)
    what = " ".join(model.decode(i).strip() for i in ids)
    rival = "" if versus is None else f" against {model.decode(versus).strip()!r}"
    proof, more = prove_best(model, run, ids, found.units, found.scores.tolist(), draws, seed, WORDS[level], versus)
    return Ranking(
        title=f"{WORDS[level]} of {model.name} that raise {what!r}{rival}",
        items=[str(unit) for unit in found.units],
        scores=found.scores,
        columns=_columns(found, run),
        measure="logit difference increase" if versus is not None else "log-probability increase",
        unit="logits" if versus is not None else "nats",
        order="given",
        check=check,
        proof=proof,
        notes=(*notes, *more),
    )


def _elements(model: Model, parts: Parts, goal: Goal, k: int, level: str) -> tuple[Ranked, Check, list[str]]:
    if not parts.groups:
        why = next(iter(parts.missing.values()), "no layer has them")
        raise UnsupportedError(f"{WORDS[level]} of {model.name}", why, "choose level='layer'")
    found = top_elements(parts, goal, k)
    error = max(parts.identity_error, *(group.writer.error for group in parts.groups))
    check = Check(
        name="vectors, biases and the embedding sum to the last residual stream",
        value=error,
        tolerance=rounding(model.dtype),
        sentence="relative to the largest number of the stream, or of a layer's output",
    )
    how = "certified: no other can be among them" if found.certified else "by first order, which certifies nothing"
    notes = [f"{found.evaluated:,} of {found.total:,} evaluated exactly; {how}"]
    notes += [f"layer {i} is left out: {why}" for i, why in parts.missing.items()]
    notes += [
        f"layer {i}: parts without neurons of their own make {share:.0%} of what its experts' block adds"
        for i, share in parts.unnamed.items()
        if share > rounding(model.dtype)
    ]
    return found, check, notes


def _layers(model: Model, parts: Parts, goal: Goal, k: int) -> tuple[Ranked, Check, list[str]]:
    scored = layer_scores(parts, goal)
    order = sorted(range(len(scored.units)), key=lambda i: -scored.scores[i])[:k]
    check = Check(
        name="layer scores telescope to the total",
        value=scored.total - scored.gained,
        tolerance=rounding(model.dtype) * max(1.0, abs(scored.gained)),
    )
    n, scores = len(scored.units), torch.tensor([scored.scores[i] for i in order])
    units = tuple(scored.units[i] for i in order)
    found = Ranked(units, scores, scores, (float("nan"),) * len(units), n, n, True)
    attention = sum(s for u, s in zip(scored.units, scored.scores, strict=True) if u.kind == "attn.out")
    mlp = sum(s for u, s in zip(scored.units, scored.scores, strict=True) if u.kind == "mlp.out")
    return (
        found,
        check,
        [f"attention adds {attention:.4g}, MLPs add {mlp:.4g}; from the embedding to the end {scored.gained:.4g}"],
    )


def _columns(found: Ranked, inputs: Inputs) -> dict[str, list[object]]:
    columns: dict[str, list[object]] = {"layer": [unit.layer for unit in found.units]}
    if any(unit.source >= 0 for unit in found.units):
        columns["source token"] = [inputs.tokens[0][unit.source] for unit in found.units]
        columns["source"] = [unit.source for unit in found.units]
    if any(c == c for c in found.coefficients):
        columns["coefficient"] = list(found.coefficients)
    columns["bound"] = found.bounds.tolist()
    return columns
