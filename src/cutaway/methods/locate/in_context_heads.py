"""In-context heads: which heads read the labels of examples, and which of their two towers decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutaway.core.errors import ParameterError, SiteMissingError
from cutaway.core.intervention import Zero
from cutaway.core.method import method
from cutaway.core.metric import Metric
from cutaway.core.params import Count, DrawCount, Layers, Prompts, Target
from cutaway.core.proof import Check, Proof
from cutaway.engine.replay import replay
from cutaway.models.handle import Model
from cutaway.ops.ablation import Ablation
from cutaway.ops.draws import UNASKED, Draws, proof_of, sizes
from cutaway.ops.labelled import Labelled, labelled
from cutaway.ops.readout import Head
from cutaway.ops.towers import Reading, read
from cutaway.ops.units import Unit
from cutaway.ops.watched import rounding
from cutaway.results.ranking import Ranking

WORTH = 0.1  # of the best of each list: heads below are not found
ONE = 0.5  # of a head's gain on its best label: with less on all others it is a head of that label
EVERY = "every label"
PROMPTS = '["#70 #71 #80 #72 #73", "#74 #72 #75 #71 #76", "#77 #71 #78 #72 #79"]'


@method(cites="yu2024towers", example={"prompts": PROMPTS, "labels": "#71, #72, #81, #83", "k": 4})
def in_context_heads(
    model: Model,
    prompts: Prompts,
    labels: list[Target],
    gold: list[Target] | None = None,
    layers: Layers | None = None,
    k: Count = 10,
    draws: DrawCount = 5,
    seed: int = 0,
) -> Ranking:
    """Heads by what they add to the right label's log-probability, and whether the model needs them for it, in nats.

    A prompt shows words with labels and asks one more. A head is found when it is among the first k of both lists, by
    what it adds and by what the margin over the other label loses without it, with at least a tenth of the best of
    each. Beside it stands the evidence: how much it attends to its labels when they are asked for and when they are
    not, and what it writes per unit of attention in either case. The first moves, the second stays: queries and keys
    decide.

    Source: Yu and Ananiadou (2024), "How do large language models learn in-context? Query and key matrices of
    in-context heads are two towers for metric learning".

    Args:
        prompts: texts or ids, each with examples, and at its end what is asked.
        labels: the tokens that are labels; each prompt shows two of them or more.
        gold: the right label of each prompt; the model's own choice among those shown when it is not given.
        layers: layers whose heads are asked; all when it is not given.
        k: length of either list, and how many heads are shown.
        draws: random draws of the proof, at least 5; 0 leaves it out.
        seed: of the draws.

    Returns:
        k heads, best first. ``kind`` is the label that a head which was found serves, or "every label"; empty for
        others. ``asked`` columns are means at labels of its kind that are right, ``not asked`` at those that are not;
        margin drops are given over prompts whose right label it serves, and over the others.

    Raises:
        InputError: a prompt that shows fewer than two labels. ParameterError: no prompt is answered rightly, or
        ``gold`` does not line up. UnsupportedError: heads or readout are not understood.
    """
    shown = labelled(model, model.inputs(prompts), labels, gold)
    asked = [prompt for prompt in shown if prompt.right]
    if not asked:
        raise ParameterError("prompts", f"none of {len(shown)} is answered rightly", "find heads where they work")
    have = [i for i, plan in enumerate(model.layers) if plan.has("attn.z") and plan.w_o]
    chosen = have if layers is None else [i for i in layers if i in have]
    if not chosen:
        raise SiteMissingError(f"heads of {model.name}", "those layers have none that write through one matrix", "")
    heads = {i: plan.attention.heads for i, plan in enumerate(model.layers) if i in chosen and plan.attention}
    if len(set(heads.values())) > 1:
        raise ParameterError(f"layers {chosen}", f"they have {[*heads.values()]} heads", "name layers alike")
    units = [Unit("attn.z", i, h) for i in chosen for h in range(heads[i])]
    head = Head(model)
    readings = [read(model, head, prompt, chosen) for prompt in asked]
    sweep = _sweep(model, asked, units)
    gain = torch.stack([reading.gain.flatten() for reading in readings])
    found = _found(gain.mean(0), sweep.drop.mean(0), k)
    kinds = [_kind(model, asked, gain[:, n]) if n in found else "" for n in range(len(units))]
    order = sorted(range(len(units)), key=lambda n: (n not in found, -float(gain[:, n].mean())))[:k]
    named = [units[n] for n in order if n in found]
    proof, more = _proof(model, asked, named, draws, seed)
    alone = len({prompt.gold for prompt in asked}) == 1
    evidence = [_evidence(model, asked, readings, sweep, n, kinds[n], heads[chosen[0]]) for n in order]
    return Ranking(
        title=f"in-context heads of {model.name}: {len(named)} found",
        items=[str(units[n]) for n in order],
        scores=gain.mean(0)[order],
        columns={
            "kind": [kinds[n] for n in order],
            "layer": [units[n].layer for n in order],
            "margin drop": sweep.drop.mean(0)[order],
            "accuracy drop": (sweep.drop >= sweep.base[:, None]).float().mean(0)[order],
            **{name: [row[name] for row in evidence] for name in evidence[0]},
        },
        measure="log-probability increase of the right label",
        unit="nats",
        order="given",
        check=Check(
            name="vectors, biases and the embedding sum to the last residual stream",
            value=max(reading.error for reading in readings),
            tolerance=rounding(model.dtype),
        ),
        proof=proof,
        notes=(
            f"{len(asked)} of {len(shown)} prompts are answered rightly among their labels, and used",
            f"found: among the first {k} by what is added and by the margin lost, each at least {WORTH:g} of the best",
            *(["one label is right in all of them: whether heads serve that one alone is not told"] if alone else []),
            *more,
        ),
    )


@dataclass(frozen=True)
class _Sweep:
    """[prompt] margins of the right label, and [prompt, head] what they lose without each."""

    base: Tensor
    drop: Tensor


def _sweep(model: Model, asked: list[Labelled], units: list[Unit]) -> _Sweep:
    base, drop = [], []
    for prompt in asked:
        runs = [Zero(str(unit)) for unit in units]
        found = replay(model, prompt.inputs, runs, Metric("logit_diff", (prompt.gold, prompt.rival)))
        base.append(found.base.float())
        drop.append((found.base - found.values).float())
    return _Sweep(torch.stack(base), torch.stack(drop))


def _found(gain: Tensor, drop: Tensor, k: int) -> set[int]:
    """Heads among the first k of both lists, with at least ``WORTH`` of the best of each."""
    lists = []
    for values in (gain, drop):
        best = values.topk(min(k, len(values)))
        kept = (best.values > 0) & (best.values >= WORTH * best.values[0])
        lists.append(set(best.indices[kept].tolist()))
    return lists[0] & lists[1]


def _kind(model: Model, asked: list[Labelled], gain: Tensor) -> str:
    """The label on which alone a head adds something, or every label."""
    rights = list(dict.fromkeys(prompt.gold for prompt in asked))
    means = torch.stack([gain[[prompt.gold == label for prompt in asked]].mean() for label in rights])
    best = int(means.argmax())
    rest = torch.cat([means[:best], means[best + 1 :]])
    alone = bool((rest < ONE * means[best]).all())
    return model.decode(rights[best]).strip() if alone else EVERY


def _evidence(
    model: Model, asked: list[Labelled], readings: list[Reading], sweep: _Sweep, n: int, kind: str, heads: int
) -> dict[str, float]:
    """Attention and writing at labels of the head's kind, when they are asked for and when not; drops likewise."""
    layer, h = divmod(n, heads)
    alone = len({prompt.gold for prompt in asked}) == 1
    attention: dict[bool, list[float]] = {True: [], False: []}
    writes: dict[bool, list[float]] = {True: [], False: []}
    drops: dict[bool, list[float]] = {True: [], False: []}
    for b, (prompt, reading) in enumerate(zip(asked, readings, strict=True)):
        names = [kind in ("", EVERY) or model.decode(label).strip() == kind for label in prompt.labels]
        for right in (True, False):
            at = [p for p, label in enumerate(prompt.labels) if names[p] and (label == prompt.gold) is right]
            if at:
                attention[right].append(float(reading.attention[layer, h, at].sum()))
                writes[right].append(float(reading.writes[layer, h, at].mean()))
        if kind in ("", EVERY) or alone:
            drops[True].append(float(sweep.drop[b, n]))
            drops[False].append(float(sweep.drop[b, n]))
        else:
            drops[model.decode(prompt.gold).strip() == kind].append(float(sweep.drop[b, n]))
    found = {}
    told = ("asked", "not asked")
    for what, values, words in (
        ("margin drop", drops, ("its label", "other labels")),
        ("attention", attention, told),
        ("writes", writes, told),
    ):
        for right, word in zip((True, False), words, strict=True):
            numbers = values[right]
            found[f"{what}, {word}"] = sum(numbers) / len(numbers) if numbers else float("nan")
    return found


def _proof(
    model: Model, asked: list[Labelled], units: list[Unit], n_draws: int, seed: int
) -> tuple[Proof | None, list[str]]:
    """What the right labels lose without the heads found, together, against random ones."""
    if n_draws == 0:
        return None, [UNASKED]
    drawer = Draws(model, units, max(prompt.inputs.ids.shape[1] for prompt in asked), seed)
    if drawer.most == 0:
        return None, ["no proof: no head was found, or there are too few others to compare with"]
    ks = sizes(drawer.most)
    sets: list[Any] = [*drawer.sets(ks, n_draws)]
    drop = torch.zeros(len(sets), dtype=torch.float64)
    for prompt in asked:
        ablation = Ablation(model, prompt.inputs, [prompt.gold])
        drop += (float(ablation.base().logp[0]) - ablation(sets).logp.double()) / len(asked)
    n = len(ks)
    notes = (
        [] if drawer.most == len(units) else [f"the proof takes the first {drawer.most}: others must be left to draw"]
    )
    random, what = drop[n:].view(n_draws, n), "zeroing the heads found"
    return proof_of(drop[:n], random, ks, what, drawer.matched, distinct=drawer.distinct), notes
