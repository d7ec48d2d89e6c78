"""Query neurons: what switched on the neurons that raise an answer."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import annotated_types
import torch
from torch import Tensor

from cutaway.core.errors import ParameterError, UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.method import method
from cutaway.core.params import Count, DrawCount, Image, Prompt, Target
from cutaway.core.proof import Check
from cutaway.models.handle import Model
from cutaway.ops.draws import prove_best
from cutaway.ops.origin import components, other_prompt
from cutaway.ops.parts import Level, Parts, take_apart, unpadded
from cutaway.ops.stats import rank_correlation
from cutaway.ops.subkeys import ValueNeurons, find_values, read_values, totals
from cutaway.ops.units import EMBED, Unit
from cutaway.ops.watched import rounding
from cutaway.results.ranking import Ranking

LevelName = Literal["layer", "head", "neuron"]
WORDS = {"layer": "sublayers", "head": "heads", "neuron": "FFN neurons"}
KINDS = {"both": ("attn.z", "mlp.act"), "attention": ("attn.z",), "ffn": ("mlp.act",)}


class Found(NamedTuple):
    """One query item: its place (None for the embedding), kind and layer, and [R, d] what it added where it is read."""

    unit: Unit | None
    kind: str
    layer: int
    vector: Tensor

    @property
    def text(self) -> str:
        """Its name in the ranking."""
        return EMBED if self.unit is None else str(self.unit)


@method(cites="yu2024neuron", example={"prompt": "#5 #9 #6 #7 #8", "k": 5})
def query_neurons(
    model: Model,
    prompt: Prompt,
    ranking: Ranking | None = None,
    image: Image | None = None,
    target: Target | None = None,
    versus: Target | None = None,
    level: LevelName = "neuron",
    values: Literal["both", "attention", "ffn"] = "both",
    most: Count = 30,
    k: Count = 30,
    verify: Annotated[int, annotated_types.Ge(0)] = 30,
    draws: DrawCount = 5,
    seed: int = 0,
) -> Ranking:
    """What switched on the neurons that raise the answer, in the nats of those it switched on.

    Value neurons raise the answer directly; a query neuron is what made their coefficients large, at the position that
    they read. A coefficient is a sum over all that was added to the stream there; a part's share of it, times what the
    value neuron adds to the answer, summed over value neurons, is the part's score. The first are then taken out of the
    states that are read, one by one, and the coefficients computed again. The proof zeroes them in the model.

    Source: Yu and Ananiadou (2024), "Neuron-level knowledge attribution in large language models", section 3.3.

    Args:
        prompt: text or token ids.
        ranking: value neurons with their scores (attention neurons by source position, or FFN neurons); found here when
            it is not given.
        image: an image that goes with the prompt.
        target: the token whose log-probability is explained; the model's own answer when it is not given.
        versus: a rival token: the score is then that of the logit difference.
        level: what is ranked: the embedding and sublayers, heads, or FFN neurons.
        values: the value neurons found here: attention neurons (read at their source position), FFN neurons (read at
            the last position), or both.
        most: how many value neurons of each kind are looked at.
        k: how many query items are shown.
        verify: how many of them, from the first on, are taken out of the states that are read.
        draws: random draws of the proof, at least 5; 0 leaves it out.
        seed: of the draws.

    Returns:
        the k items that score most. ``position`` is where most of the score arose, ``through`` the value neuron that
        took most of it, with the item's contribution to its coefficient and share of it; ``removal`` the score that
        taking the item out of the states gives, the norm's scale included.

    Raises:
        UnsupportedError: no value neuron whose reading is understood, or layers that do not add to the residual stream.
        ParameterError: a ranking of something else than neurons.
    """
    batch = unpadded(model.inputs(prompt, image))
    token = int(model(batch)[0, -1].argmax()) if target is None else target
    found = _values(model, batch, ranking, token, versus, values, most)
    parts = take_apart(model, batch, found.positions, level)
    items = _best(parts, found, k, level)
    table = _table(items, found, batch, level, verify)
    sums = totals(parts, found)
    scores = torch.tensor(table.pop("score"))
    error = max(sums.error, parts.identity_error, *(group.writer.error for group in parts.groups), 0.0)
    units = [item.unit for item in items if item.unit is not None]
    own = [s for item, s in zip(items, scores.tolist(), strict=True) if item.unit is not None]
    proof, more = prove_best(model, batch, [token], units, own, draws, seed, f"query {WORDS[level]}", versus)
    rival = "" if versus is None else f" against {model.decode(versus).strip()!r}"
    return Ranking(
        title=f"{WORDS[level]} of {model.name} that switch on what raises {model.decode(token).strip()!r}{rival}",
        items=[item.text for item in items],
        scores=scores,
        columns=table,
        measure="share of the value neurons' increase",
        unit="logits" if versus is not None else "nats",
        check=Check(
            name="parts and constants sum to the value neurons' coefficients",
            value=error,
            tolerance=rounding(model.dtype),
            sentence="as a share of what those add; and the stream is the sum of its parts",
        ),
        proof=proof,
        notes=(*_notes(found, sums.shared, scores, table), *other_prompt(model, prompt, batch, ranking), *more),
    )


def _values(
    model: Model, batch: Inputs, ranking: Ranking | None, token: int, versus: int | None, which: str, most: int
) -> ValueNeurons:
    """The value neurons: those of the ranking, else those that add most."""
    if ranking is None:
        return find_values(model, batch, token, versus, most, KINDS[which])
    scores = torch.tensor(ranking.scores[:most].tolist(), device=model.device)
    if EMBED in ranking.items[:most]:
        raise ParameterError("the value neurons", "the embedding is none", "give a ranking of neurons")
    units, _ = components(model, ranking.items[:most], batch)
    found = read_values(model, batch, units, scores)
    if not found.units:
        asked = f"the value neurons of the ranking in {model.name}"
        raise UnsupportedError(asked, f"none can be read ({'; '.join(found.left_out)})", "")
    return found


def _best(parts: Parts, values: ValueNeurons, k: int, level: Level) -> list[Found]:
    """The k items with the highest scores; a product of each item's vector with one vector says which."""
    if level == "layer":
        found = [Found(None, EMBED, -1, parts.layers[0].x)]
        for i, layer in enumerate(parts.layers):
            for kind, part in (("attn.out", layer.attn), ("mlp.out", layer.mlp)):
                found += [] if part is None else [Found(Unit(kind, i), kind, i, part)]
        scores = torch.stack([(values.gradient(f.kind, f.layer) * f.vector).sum() for f in found])
        return [found[i] for i in _top(scores, k)]
    if not parts.groups:
        why = next(iter(parts.missing.values()), "no layer has them")
        raise UnsupportedError(f"query {WORDS[level]}", why, "choose level='layer'")
    of_group = [group.first_order(values.gradient(group.kind, group.layer)) for group in parts.groups]
    starts = torch.tensor([0, *(len(scores) for scores in of_group)]).cumsum(0)
    scores = torch.cat(of_group)
    best = []
    for i in _top(scores, k):
        g = int(torch.searchsorted(starts, i, right=True)) - 1
        group, element = parts.groups[g], i - int(starts[g])
        vector = group.vectors(torch.tensor([element], device=scores.device))[0]
        best.append(Found(group.unit(element), group.kind, group.layer, vector))
    return best


def _top(scores: Tensor, k: int) -> list[int]:
    """Places of the k largest; zeros, which nothing reads, are left out where there is anything else."""
    best = scores.topk(min(k, len(scores))).indices.tolist()
    return [i for i in best if float(scores[i]) != 0.0] or best[:1]


def _table(items: list[Found], values: ValueNeurons, batch: Inputs, level: str, verify: int) -> dict[str, list[object]]:
    """Score and columns of the items."""
    slopes, positions = values.slopes.cpu(), torch.tensor(values.positions)
    read_at = torch.zeros(len(values.units), dtype=torch.long)
    for read in values.reads:
        read_at[list(read.members)] = read.position
    brought, gone = torch.zeros(len(items), len(values.units)), torch.full((len(items),), float("nan"))
    places = [(item.kind, item.layer) for item in items]
    for kind, layer in dict.fromkeys(places):
        here = [i for i, place in enumerate(places) if place == (kind, layer)]
        brought[here] = values.contributions(kind, layer, torch.stack([items[i].vector for i in here])).cpu()
        tried = [i for i in here if i < verify]
        if tried:
            removed = values.removed(kind, layer, torch.stack([items[i].vector for i in tried]))
            gone[tried] = removed.cpu() @ slopes
    weighed = brought * slopes
    by_position = torch.stack([weighed[:, read_at == p].sum(1) for p in positions])
    at, most = positions[by_position.argmax(0)].tolist(), weighed.argmax(1)
    coefficients = values.coefficients.cpu()[most]
    columns: dict[str, list[object]] = {
        "score": weighed.sum(1).tolist(),
        "layer": [item.layer for item in items],
        "position": at,
        "token": [batch.tokens[0][p] for p in at],
        "through": [str(values.units[n]) for n in most.tolist()],
        "contribution": brought.gather(1, most[:, None])[:, 0].tolist(),
        "share": (brought.gather(1, most[:, None])[:, 0] / coefficients).tolist(),
        "removal": gone.tolist(),
    }
    if level == "neuron":
        direct = {str(unit) for unit in values.units}
        columns["kind"] = ["query and value" if item.text in direct else "query only" for item in items]
    return columns


def _notes(
    values: ValueNeurons, shared: dict[str, float], scores: Tensor, columns: dict[str, list[object]]
) -> list[str]:
    """What the numbers stand for, and where they mislead."""
    heads = sum(unit.kind == "attn.z" for unit in values.units)
    added = float(values.scores.sum())
    sources = ", ".join(f"{name} {value:.4g}" for name, value in shared.items())
    notes = [
        f"{heads} attention and {len(values.units) - heads} FFN value neurons add {added:.4g}, each by itself; "
        f"that is shared out as: {sources}"
    ]
    n = sum(v == v for v in columns["removal"])
    if n > 2:
        agreement = rank_correlation(scores[:n], torch.tensor(columns["removal"][:n]))
        notes.append(
            f"{n} taken out of the states that are read, one by one: rank correlation with the scores {agreement:.2f}"
        )
    if "kind" in columns:
        n = columns["kind"].count("query only")
        notes.append(f"{n} of {len(scores)} are no value neurons themselves")
    return notes + values.left_out
