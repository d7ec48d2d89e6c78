"""An explanation in plain words: what happened, sentence by sentence, from the numbers of its parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cutaway.core.errors import SiteSyntaxError
from cutaway.ops.units import Unit
from cutaway.results.grid import Grid
from cutaway.results.imagemap import ImageMap
from cutaway.results.ranking import Ranking
from cutaway.results.readout import Readout
from cutaway.results.table import Table

if TYPE_CHECKING:
    from cutaway.results.explanation import Explanation

NOUNS = {
    "layers": "layers",
    "heads": "heads",
    "head_positions": "heads by source position",
    "ffn_neurons": "FFN neurons",
    "attention_neurons": "attention neurons",
    "query_neurons": "query neurons",
    "logit_flow": "cells of the flow",
    "image_patches": "image patches",
}
"""What the parts name, for a sentence."""
TWO_HOP = "two-hop"
NAMED = 3  # components that a sentence names


def percent(p: float) -> str:
    """A probability as a reader wants it: 99.97 %, 4.1 %, 0.02 %, 3e-07."""
    if not math.isfinite(p):
        return "?"
    if p < 1e-4:
        return f"{p:.0e}" if p else "0 %"
    if p > 0.9999:
        return "100 %" if p == 1 else "> 99.99 %"
    digits = 2 if p > 0.99 or p < 0.01 else 1
    return f"{100 * p:.{digits}f} %"


def short(model: str) -> str:
    """A model's name in a sentence: the last part of a path."""
    return model.rstrip("/").rpartition("/")[2]


def signed(value: float) -> str:
    """A score with its sign."""
    return f"{value:+.3g}"


def lengths(ranking: Ranking) -> list[float]:
    """How long the bar of each score is, from 0 to 1 for the largest; 0 for one that is no number."""
    sizes = np.abs(np.nan_to_num(ranking.scores.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0))
    return list((sizes / (sizes.max(initial=0.0) or 1.0)).tolist())


def token(text: str) -> str:
    """A token in quotes, without the space that most begin with."""
    plain = text.strip() or text
    return "‘" + plain.replace("\n", "⏎").replace("\t", "⇥") + "’"


def spoken(item: str, layer: str = "layer ") -> str:
    """A component as one says it: layer 2 head 0, layer 0 neuron 292; with ``layer="L"`` in few letters."""
    try:
        unit = Unit.parse(item)
    except SiteSyntaxError:
        return item
    what = {
        "attn.out": "attention",
        "mlp.out": "MLP",
        "mlp.act": f"neuron {unit.number}",
        "attn.z": f"head {unit.number}" + (f" channel {unit.inner}" if unit.inner >= 0 else ""),
        "expert.act": f"expert {unit.number} neuron {unit.inner}",
    }[unit.kind]
    return f"{layer}{unit.layer} {what}"


def place(told: Explanation, at: int) -> str:
    """A position as one says it: its token, or its number among the image's tokens."""
    if told.roles[at] == "image":
        return f"image token {int((told.roles[:at] == 'image').sum())}"
    return token(told.tokens[at])


def listed(words: Sequence[str]) -> str:
    """One, two and three."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def story(told: Explanation) -> tuple[str, ...]:
    """What happened, in sentences."""
    makers = (_answer, _lens, _layers, _heads, _neurons, _queries, _flow, _patches, _proofs)
    return tuple(sentence for make in makers for sentence in make(told) if sentence)


def goal(told: Explanation) -> str:
    """What the scores are of."""
    against = f" against {token(told.versus)}" if told.versus else ""
    return f"{token(told.target)}{against}"


def _answer(told: Explanation) -> Iterator[str]:
    chances = np.exp(told.answer_log_probs.astype(np.float64)).tolist()
    others = [f"{token(a)} ({percent(p)})" for a, p in zip(told.answers[1:3], chances[1:3], strict=True)]
    best = f"{short(told.model) or 'The model'} continues with {token(told.answers[0])} ({percent(chances[0])})"
    yield f"{best}, before {listed(others)}." if others else f"{best}."
    if told.rank:
        chance = percent(math.exp(told.log_prob))
        yield f"What is explained here is {token(told.target)}, which comes in place {told.rank + 1} with {chance}."


def _lens(told: Explanation) -> Iterator[str]:
    lens = told.parts.get("lens")
    if not isinstance(lens, Readout) or lens.target_rank is None or not len(lens.target_rank):
        return
    ranks, chances = lens.target_rank[:, -1], np.exp(lens.target_log_prob[:, -1].astype(np.float64))
    names = lens.along("layer")
    first = next((i for i in range(len(ranks)) if not ranks[i:].any()), None)
    if first is None:
        best = int(chances.argmax())
        yield f"Read layer by layer it never comes first; it is likeliest after {_after(names[best])}."
        return
    before = f" ({percent(chances[first - 1])} just before, {percent(chances[first])} there)" if first else ""
    yield f"Read layer by layer, {token(told.target)} comes first from {_after(names[first])} on{before}."


def _after(layer: object) -> str:
    return f"layer {layer}" if isinstance(layer, int) else "the embedding"


def _layers(told: Explanation) -> Iterator[str]:
    layers = told.parts.get("layers")
    if not isinstance(layers, Ranking) or not len(layers):
        return
    sides = {side: float(sum(s for i, s in _scored(layers) if i.endswith(side))) for side in ("attn.out", "mlp.out")}
    total = sum(sides.values())
    yield (
        f"From the embedding to the end {goal(told)} {'gains' if total >= 0 else 'loses'} {abs(total):.3g} "
        f"{layers.unit}: attention brings "
        f"{signed(sides['attn.out'])}, the MLPs {signed(sides['mlp.out'])}; most come from {_best(layers)}."
    )


def _heads(told: Explanation) -> Iterator[str]:
    heads, places = told.parts.get("heads"), told.parts.get("head_positions")
    if not isinstance(heads, Ranking) or not len(heads):
        return
    sentence = f"Of {len(heads):,} heads, {_best(heads)} add most"
    if isinstance(places, Ranking) and len(places):
        sentence += f"; what the heads bring comes mostly from {_sources(told, places)}"
    yield sentence + "."


def _sources(told: Explanation, places: Ranking) -> str:
    """The positions that the best heads read, with their share of what all those named bring."""
    by_source: dict[int, float] = {}
    for item, score in _scored(places):
        if score > 0:
            source = Unit.parse(item).source
            by_source[source] = by_source.get(source, 0.0) + score
    total = sum(by_source.values()) or 1.0
    best = sorted(by_source.items(), key=lambda pair: -pair[1])[:2]
    return listed([f"{place(told, at)} ({score / total:.0%})" for at, score in best])


def _neurons(told: Explanation) -> Iterator[str]:
    neurons = told.parts.get("ffn_neurons")
    if not isinstance(neurons, Ranking) or not len(neurons):
        return
    sentence = f"The FFN neurons that add most are {_best(neurons)}"
    writes = told.parts.get("writes")
    if isinstance(writes, Table) and len(writes.columns["component"]):
        sentence += (
            f"; the first raises {token(str(writes.columns['raises'][0]).split(', ')[0].rpartition(' ')[0])} most"
        )
        top = [i for i, place in enumerate(writes.columns["target place"]) if place == 0]
        if top:
            sentence += (
                f", and {len(top)} of {len(writes.columns['component'])} raise {token(told.target)} most of all tokens"
            )
    yield sentence + "."


def _queries(told: Explanation) -> Iterator[str]:
    queries = told.parts.get("query_neurons")
    if isinstance(queries, Ranking) and len(queries):
        yield f"They were switched on earlier, most by {_best(queries)}."


def _flow(told: Explanation) -> Iterator[str]:
    flow = told.parts.get("logit_flow")
    if not isinstance(flow, Grid) or flow.values.ndim != 3 or not flow.values.size:
        return
    handed = [i for i, name in enumerate(flow.along("flow")) if str(name).startswith("query")]
    values = flow.values[handed]
    if not handed or not np.isfinite(values).any():
        return
    which, layer, position = (int(i) for i in np.unravel_index(int(np.nanargmax(values)), values.shape))
    name = flow.along("layer")[layer]
    part = str(flow.along("flow")[handed[which]]).partition(": ")[2]
    what = "the embedding" if name == "embed" else f"the {part.partition(',')[0]} of layer {name}"
    yield (
        f"Followed one step back, most was brought by {what} at {place(told, position)} "
        f"({signed(float(values[which, layer, position]))} {flow.unit})."
    )


def _patches(told: Explanation) -> Iterator[str]:
    patches = told.parts.get("image_patches")
    if not isinstance(patches, ImageMap) or TWO_HOP not in patches.along("map"):
        return
    values = patches.values[patches.along("map").index(TWO_HOP)]
    row, column = (int(i) for i in np.unravel_index(int(np.nanargmax(values)), values.shape))
    sentence = (
        f"In the image the patch in row {row + 1}, column {column + 1} brings most "
        f"({signed(float(values[row, column]))} {patches.unit}, directly and through the words)"
    )
    share = patches.figures.get("image share")
    yield sentence + (f"; the image's share of the answer is {share:.2f}." if share is not None else ".")


def _proofs(told: Explanation) -> Iterator[str]:
    proof = told.proof or next((each for each in told.proofs.values() if each.holds), None)
    if proof is not None:
        before, effect = math.exp(told.log_prob), float(proof.effect[-1])
        after = "" if told.versus else f", to a probability of {percent(before * math.exp(-effect))}"
        what = proof.ablated.removeprefix("zeroing the top ")
        yield (
            f"Without the {proof.ks[-1]} {what} named, {proof.metric} {_moves(effect, 3)} {proof.unit}{after}; "
            f"without as many random ones it {_moves(float(proof.random[:, -1].mean()), 2)}."
        )
    if told.unproved:
        yield (
            f"Not proved: taking away the {listed([NOUNS.get(name, name) for name in told.unproved])} named does not "
            "reliably lower it more than taking away random others."
        )


def _moves(drop: float, digits: int) -> str:
    return f"{'falls' if drop >= 0 else 'rises'} by {abs(drop):.{digits}g}"


def _best(ranking: Ranking) -> str:
    best = [(item, score) for item, score in _scored(ranking) if score > 0][:NAMED] or list(_scored(ranking))[:1]
    return listed([f"{spoken(item)} ({signed(score)})" for item, score in best])


def _scored(ranking: Ranking) -> Iterator[tuple[str, float]]:
    return zip(ranking.items.tolist(), ranking.scores.tolist(), strict=True)
