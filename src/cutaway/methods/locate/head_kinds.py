"""Kinds of heads: which look at the token before, at the same token, behind it, copy it, or read labels in context."""

from __future__ import annotations

from typing import Annotated, Literal

import annotated_types
import torch
from torch import Tensor

from cutaway.core.errors import InputError, ParameterError, SiteMissingError, UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.method import method
from cutaway.core.params import Count, DrawCount, Prompts, Target
from cutaway.core.proof import Check, Proof
from cutaway.models.handle import Model
from cutaway.ops.ablation import Ablation
from cutaway.ops.draws import UNASKED, Draws, proof_of, sizes
from cutaway.ops.ov import NOTHING, circuits
from cutaway.ops.relations import attention_by_chance, attention_on, label_signs, relations
from cutaway.ops.texts import labelled_tokens, plain_ids, repeated_tokens
from cutaway.ops.units import Unit
from cutaway.results.grid import Grid

KindName = Literal["previous token", "duplicate token", "induction", "copying", "in-context"]
KINDS: tuple[KindName, ...] = ("previous token", "duplicate token", "induction", "copying", "in-context")
WORTH = 0.5  # of the best score: heads below are not of the kind
CHANCE = 2.0  # times what even attention gives: heads below are not of the kind either
EXACT = 1e-3  # of the eigenvalues' sizes: rounding of their sum


@method(cites=("olsson2022induction", "elhage2021framework"), example={"count": 2, "length": 6, "tokens": 40})
def head_kinds(
    model: Model,
    prompts: Prompts | None = None,
    labels: list[Target] | None = None,
    count: Count = 8,
    length: Annotated[int, annotated_types.Ge(2)] = 25,
    copying: Literal["eigenvalues", "place"] = "eigenvalues",
    tokens: Annotated[int, annotated_types.Ge(2)] = 512,
    prove: KindName = "induction",
    k: Count = 3,
    draws: DrawCount = 5,
    seed: int = 0,
) -> Grid:
    """How much each head is of each kind: previous token, duplicate token, induction, copying, in-context.

    The first three are shares of attention, on random tokens that are said twice or on the prompts given: to the token
    before; to earlier positions of the same token; to the positions behind those. In-context is the attention from the
    word asked to labels of its kind less that to the other labels. Copying says whether a head raises the token that
    it looks at, by the circuit from embedding to unembedding. The proof takes the heads of one kind away.

    Source: Olsson et al. (2022), "In-context learning and induction heads"; Elhage et al. (2021), "A mathematical
    framework for transformer circuits".

    Args:
        prompts: texts or ids to look at instead of random tokens.
        labels: tokens that are labels in ``prompts``: in-context is then attention from the last position to the label
            that the model answers with, less that to the others.
        count: how many random texts.
        length: how many random tokens are said, then said again; fewer where the model has not so many positions.
        copying: the share of the circuit's eigenvalues that is positive, sum(Re) / sum(abs), from -1 to 1; or the
            mean place of a token among those it raises, 1 for the first and 0 for chance.
        tokens: how many tokens the copying circuit is taken over, drawn at random.
        prove: the kind whose heads the proof takes away.
        k: how many of them at most; those with less than half the best score are not among them.
        draws: random draws of the proof, at least 5; 0 leaves it out.
        seed: of the texts, the tokens and the draws.

    Returns:
        scores [kind, layer, head]; NaN where a kind was not measured or a head writes nothing.

    Raises:
        ParameterError: labels without prompts, or too few tokens to draw from.
        SiteMissingError: no layer attends. InputError: a prompt of one token alone.
    """
    if labels and prompts is None:
        raise ParameterError("parameter 'labels'", "no prompts are given", "give the prompts that hold them")
    heads = {i: p.attention.heads for i, p in enumerate(model.layers) if p.has("attn.pattern") and p.attention}
    if not heads:
        why = model.layers[0].refused.get("attn.pattern", "")
        raise SiteMissingError(f"heads of {model.name}", why, "this model has no patterns to read")
    generator = torch.Generator().manual_seed(seed)
    allowed = plain_ids(model)
    if prompts is None:
        texts = repeated_tokens(model, allowed, count, length, generator)
        asked = labelled_tokens(model, allowed, count, generator)
    else:
        texts = model.inputs(prompts)
        asked = texts, label_signs(texts, _answers(model, texts), labels) if labels else None
    scores = torch.full((len(KINDS), len(heads), max(heads.values())), float("nan"))
    chance = _looked(model, texts, heads, scores)
    if asked[1] is not None:
        found = attention_on(model, asked[0], [*heads], [asked[1]])
        for row, i in enumerate(heads):
            scores[4, row, : heads[i]] = found[i][0]
    drawn = [allowed[i] for i in torch.randperm(len(allowed), generator=generator)[:tokens].tolist()]
    check, notes = _copied(model, texts, drawn, heads, copying, scores)
    for kind, name in enumerate(KINDS):
        if not bool(scores[kind].isnan().all()):
            even = f" (even attention: {chance[kind]:.2f})" if kind < len(chance) else ""
            notes.append(f"{name}: {_best(scores[kind], heads)}{even}")
    kind = KINDS.index(prove)
    least = CHANCE * chance[kind] if kind < len(chance) else 0.0
    ranked = [(score, unit) for score, unit in _order(scores[kind], heads)[:k] if score > least]
    named = [unit for score, unit in ranked if score >= WORTH * ranked[0][0]]
    proof, more = _proof(model, texts, prompts is None, named, prove, draws, seed)
    what = f"{len(texts)} random texts" if prompts is None else f"{len(texts)} prompts"
    return Grid(
        title=f"kinds of heads of {model.name}, on {what}",
        values=scores,
        axes=("kind", "layer", "head"),
        labels={"kind": KINDS, "layer": tuple(heads)},
        measure="score",
        unit="share",
        check=check,
        proof=proof,
        notes=(*notes, *more),
    )


def _answers(model: Model, texts: Inputs) -> list[int]:
    last = model(texts)[torch.arange(len(texts)), torch.tensor(texts.last)]
    return [int(i) for i in last.argmax(-1)]


def _looked(model: Model, texts: Inputs, heads: dict[int, int], scores: Tensor) -> list[float]:
    """Fill in the shares of attention on the positions that stand in each relation; what even attention gives."""
    if max(texts.lengths) < 2:
        raise InputError("prompts", "none has more than one token", "give longer ones")
    asked = relations(texts)
    found = attention_on(model, texts, [*heads], asked)
    for row, i in enumerate(heads):
        scores[:3, row, : heads[i]] = found[i]
    return attention_by_chance(texts, asked)


def _copied(
    model: Model, texts: Inputs, ids: list[int], heads: dict[int, int], how: str, scores: Tensor
) -> tuple[Check | None, list[str]]:
    """Fill in the copying scores; the check, and what could not be told."""
    try:
        by_layer, missing = circuits(model, texts.row(0), model.inputs([[i] for i in ids]))
    except UnsupportedError as error:
        return None, [f"copying is left out: {error.found}"]
    notes = [f"copying of layer {i} is left out: {why}" for i, why in missing.items()]
    if not by_layer:
        return None, notes or ["copying is left out: no head writes through one matrix"]
    most = max(float(each.size.max()) for each in by_layer.values())
    worst = 0.0
    for i, each in by_layer.items():
        values = each.eigenvalues()
        total = values.abs().sum(-1)
        told = each.size > NOTHING * most
        sums = values.real.sum(-1)
        gap = (sums - each.trace()).abs() / total.clamp_min(torch.finfo(total.dtype).tiny)
        worst = max(worst, float(torch.where(told, gap, 0).max()))
        score = sums / total if how == "eigenvalues" else each.own_place()
        scores[3, [*heads].index(i), : heads[i]] = torch.where(told, score, float("nan")).cpu()
    check = Check(name="eigenvalues of copying circuits sum to their trace", value=worst, tolerance=EXACT)
    return check, [*notes, f"copying: {how} over {len(ids)} tokens"]


def _order(scores: Tensor, heads: dict[int, int]) -> list[tuple[float, Unit]]:
    """Heads with their scores, best first; those without a score are left out."""
    found = [
        (float(scores[row, h]), Unit("attn.z", i, h))
        for row, i in enumerate(heads)
        for h in range(heads[i])
        if not bool(scores[row, h].isnan())
    ]
    return sorted(found, key=lambda each: -each[0])


def _best(scores: Tensor, heads: dict[int, int]) -> str:
    return ", ".join(f"{unit} {score:.2f}" for score, unit in _order(scores, heads)[:3])


def _proof(
    model: Model, texts: Inputs, random: bool, units: list[Unit], prove: KindName, n_draws: int, seed: int
) -> tuple[Proof | None, list[str]]:
    """What the tokens said again, or the answers, lose without the heads of one kind."""
    if n_draws == 0:
        return None, [UNASKED]
    drawer = Draws(model, units, texts.ids.shape[1], seed)
    if drawer.most == 0:
        return None, [f"no proof: no head is of kind {prove!r}, or there are too few others to compare with"]
    ks = sizes(drawer.most)
    sets = drawer.sets(ks, n_draws)
    drop = torch.zeros(len(sets), dtype=torch.float64)
    answers = [] if random else _answers(model, texts)
    for b in range(len(texts)):
        row = texts.row(b)
        if random:  # the second time, all but its first token can be known
            ids = row.ids[0, -(row.ids.shape[1] // 2) + 1 :].tolist()
            row = model.inputs([row.ids[0, :-1].tolist()])
        else:
            ids = [answers[b]]
        ablation = Ablation(model, row, ids)
        drop += (float(ablation.base().logp[0]) - ablation(sets).logp.double()) / (len(ids) * len(texts))
    n = len(ks)
    what = "per token said again" if random else "of the model's answers"
    proof = proof_of(
        drop[:n],
        drop[n:].view(n_draws, n),
        ks,
        f"zeroing heads of kind {prove!r}",
        drawer.matched,
        distinct=drawer.distinct,
    )
    return proof, [f"the proof's log p is the mean {what}"]
