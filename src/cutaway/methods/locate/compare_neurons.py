"""Comparative neuron analysis: which FFN neurons make the difference between two runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cutaway.core.errors import InputError, MismatchError, ParameterError, UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Intervention, Zero
from cutaway.core.method import method
from cutaway.core.metric import Metric
from cutaway.core.params import Count, DrawCount, Image, Interventions, Layers, Prompts, Target
from cutaway.core.proof import Check, Proof
from cutaway.engine.replay import replay
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.ops.comparison import Case, Comparison
from cutaway.ops.draws import UNASKED, Draws, different, proof_of, sizes
from cutaway.ops.importance import Goal
from cutaway.ops.maskkeep import MaskKeep, mask_and_keep
from cutaway.ops.parts import take_apart, unpadded
from cutaway.ops.readout import Head
from cutaway.ops.units import Unit
from cutaway.ops.watched import rounding
from cutaway.results.ranking import Ranking


@method(
    cites="yu2024arithmetic",
    example={"prompts": "#5 #9 #6 #7 #8", "against": "#5 #4 #6 #7 #8", "k": 4, "draws": 0},
)
def compare_neurons(
    model: Model,
    prompts: Prompts,
    do: Interventions | None = None,
    other: str | None = None,
    against: Prompts | None = None,
    image: Image | None = None,
    target: Target | None = None,
    layers: Layers | None = None,
    score: Literal["difference", "lost"] = "difference",
    changed: bool = False,
    k: Count = 30,
    draws: DrawCount = 5,
    seed: int = 0,
) -> Ranking:
    """FFN neurons by how much less they add to the answer in a second run that differs in one thing, in nats.

    The second run is the model under an intervention, another model, or another prompt; without any of these, the model
    without the head that costs the answers most. A score is the importance in the first run less that in the second,
    both for the first run's answer and through its frozen readout. Beside it stands the plain importance, and what the
    answers lose without the first neurons of either ranking, or keep with them alone, against random ones.

    Source: Yu and Ananiadou (2024), "Interpreting arithmetic mechanism in large language models through comparative
    neuron analysis".

    Args:
        prompts: a text or ids, or several; scores are then means over them.
        do: interventions that the second run has, e.g. ``zero L1.attn.z[5]``.
        other: folder, specimen or checkpoint of a second model of the same shape, or the model with an adapter, as
            ``town+./my-lora``.
        against: the second run's prompts, one for each; one may stand against several.
        image: an image that goes with the one prompt.
        target: the token whose log-probability is compared; the first run's own answers when it is not given.
        layers: layers whose neurons are compared; all when it is not given.
        score: the difference of both importances, as the paper has it; or what is lost, where a neuron that pushes
            against the answer in the second run counts as nothing there.
        changed: use those prompts alone whose answer is another one in the second run.
        k: how many neurons are shown, and taken away or kept.
        draws: random draws, at least 5; 0 leaves out the proof and what is lost and kept.
        seed: of the draws.

    Returns:
        the k neurons with the largest differences: importance and coefficient in both runs, the share of the
        coefficient that is lost, and whether it is among the k of most plain importance. Row i also has the mean
        probability of the answers without the first i + 1 neurons of each ranking, and with these alone of those
        compared.

    Raises:
        ParameterError: more than one difference, or no prompt is left. MismatchError: models of another shape, or other
        numbers of prompts. UnsupportedError: no layer has neurons, or the readout is not understood.
    """
    given = [name for name, value in (("do", do), ("other", other), ("against", against)) if value is not None]
    if len(given) > 1:
        raise ParameterError(
            f"parameters {' and '.join(map(repr, given))}", "the runs differ in two things", "give one"
        )
    rows = _rows(model, prompts, image)
    answers = [int(model(row)[0, -1].argmax()) if target is None else target for row in rows]
    notes: list[str] = []
    if not given:
        do, note = _root(model, rows, answers)
        notes.append(note)
    second = _second(model, rows, do, other, against, image)
    if len(second.rows) > len(rows) == 1:
        rows, answers = rows * len(second.rows), answers * len(second.rows)
    cases, rows, answers, note = _cases(model, rows, answers, second, changed)
    notes.append(note)
    have = sorted({g.layer for case in cases for g in case.a.groups})
    chosen = have if layers is None else [i for i in layers if i in have]
    if not chosen:
        why = next(iter(cases[0].a.missing.values()), "those layers have none")
        raise UnsupportedError(f"FFN neurons of {model.name}", why, "name other layers")
    notes += [f"layer {i} is left out: {why}" for i, why in cases[0].a.missing.items() if layers is None or i in layers]
    compared = Comparison(cases, chosen)
    best, plain = compared.top(k, score), compared.top(k, "importance")
    how = "certified" if compared.certified else "by first order under a soft cap, which certifies nothing"
    notes.append(f"{best.evaluated:,} of {best.total:,} evaluated exactly in both runs; {how}")
    columns = _columns(compared, best.index, plain.index)
    proof, more = _left(model, rows, answers, compared, best.index, plain.index, chosen, columns, draws, seed)
    error = max(
        parts.identity_error if which == "stream" else max((g.writer.error for g in parts.groups), default=0.0)
        for case in cases
        for parts in (case.a, case.b)
        for which in ("stream", "writers")
    )
    return Ranking(
        title=f"FFN neurons of {model.name} that make the difference to {second.name}",
        items=[str(unit) for unit in compared.units(best.index)],
        scores=best.score,
        columns=columns,
        measure="difference of log-probability increases" if score == "difference" else "log-probability increase lost",
        unit="nats",
        order="given",
        check=Check(
            name="vectors, biases and the embedding sum to the last residual stream, in both runs",
            value=error,
            tolerance=rounding(model.dtype),
        ),
        proof=proof,
        notes=(*notes, *more),
    )


@dataclass(frozen=True)
class _Second:
    """The second run: which model, under what, of which prompts; and how it is called."""

    model: Model
    do: Sequence[Intervention]
    rows: list[Inputs]
    name: str


def _rows(model: Model, prompts: Any, image: Any) -> list[Inputs]:
    if image is None:
        batch = model.inputs(prompts)
        return [unpadded(batch)] if len(batch) == 1 else [batch.row(b) for b in range(len(batch))]
    if not isinstance(prompts, list) or len(prompts) != 1:
        raise InputError("prompts with an image", f"{len(prompts)} are given", "give one")
    return [unpadded(model.inputs(prompts[0], image))]


def _root(model: Model, rows: list[Inputs], answers: list[int]) -> tuple[list[Intervention], str]:
    """Zeroing of the head that costs the answers most, and the first of that sweep."""
    sites = [site.at(index=h) for site in model.expand("L*.attn.z") for h in range(model.anatomy().size(site))]
    drops = torch.zeros(len(sites), dtype=torch.float64)
    for row, answer in zip(rows, answers, strict=True):
        swept = replay(model, row, [Zero(site) for site in sites], Metric("logprob", (answer,)))
        drops += (swept.base - swept.values).double() / len(rows)
    order = drops.argsort(descending=True).tolist()
    first = ", ".join(f"{sites[i]} {float(drops[i]):.3g}" for i in order[:5])
    return [Zero(sites[order[0]])], f"drops in log p without each of {len(sites)} heads, the largest: {first}"


def _second(
    model: Model,
    rows: list[Inputs],
    do: Sequence[Intervention] | None,
    other: str | None,
    against: Any,
    image: Any,
) -> _Second:
    if do is not None:
        return _Second(model, do, rows, ", ".join(map(str, do)))
    if other is not None:
        that = load(other, dtype=model.dtype, device=model.device)
        ours, theirs = (_shape(m) for m in (model, that))
        if ours != theirs:
            raise MismatchError(f"{model.name} and {other}", f"their shapes are {ours} and {theirs}", "")
        return _Second(that, (), rows, other)
    second = _rows(model, against, image)
    second = second * len(rows) if len(second) == 1 else second
    if len(second) != len(rows) > 1:
        raise MismatchError("prompts and 'against'", f"{len(rows)} and {len(second)} are given", "give one for each")
    return _Second(model, (), second, "other prompts")


def _shape(model: Model) -> dict[str, Any]:
    return {
        "architecture": getattr(model.hf.config, "model_type", type(model.hf).__name__),
        "d_model": model.anatomy().d_model,
        "vocabulary": model.encoder.vocabulary_size,
        "neurons": [plan.d_mlp or plan.n_experts * plan.d_expert for plan in model.layers],
    }


def _cases(
    model: Model, rows: list[Inputs], answers: list[int], second: _Second, changed: bool
) -> tuple[list[Case], list[Inputs], list[int], str]:
    """Both runs of every prompt taken apart; with ``changed``, of those alone whose answer changes."""
    head = Head(model)
    cases, kept, moved, drop = [], [], 0, 0.0
    for n, (row, answer, theirs) in enumerate(zip(rows, answers, second.rows, strict=True)):
        a = take_apart(model, row, 1, "neuron")
        with second.model.doing(second.do, theirs) if second.do else nullcontext():
            b = take_apart(second.model, theirs, 1, "neuron")
        moves = int(b.logits[0].argmax()) != int(a.logits[0].argmax())
        moved += moves
        if moves or not changed:
            cases.append(Case(Goal.of(head.frozen(a.final, a.logits), [answer]), a, b))
            kept.append(n)
            drop += float(a.logits[0].log_softmax(-1)[answer] - b.logits[0].log_softmax(-1)[answer])
    if not cases:
        found = f"none of {len(rows)} prompts has another answer in the second run"
        raise ParameterError("changed=True", found, "choose another intervention, or leave it out")
    note = f"the answer changes in {moved} of {len(rows)} prompts; log p falls by {drop / len(cases):.3g} on average"
    if moved == 0:
        note = f"WARNING: {note}. The prediction stays, so differences say little about it"
    elif len(cases) > moved:
        note += "; changed=True keeps those prompts alone, the others dilute the scores"
    return cases, [rows[n] for n in kept], [answers[n] for n in kept], note


def _columns(compared: Comparison, index: Tensor, plain: Tensor) -> dict[str, Any]:
    a, b = (compared.coefficients(index, side) for side in (0, 1))
    lost = ((a - b) * a.sign()).sum(0) / a.abs().sum(0).clamp_min(torch.finfo(a.dtype).tiny)
    most = set(plain.tolist())
    return {
        "layer": [unit.layer for unit in compared.units(index)],
        "importance": compared.importance(index, 0),
        "importance there": compared.importance(index, 1),
        "coefficient": a.mean(0),
        "coefficient there": b.mean(0),
        "coefficient lost": lost,
        "among the most important": torch.tensor([i in most for i in index.tolist()]),
    }


def _left(
    model: Model,
    rows: list[Inputs],
    answers: list[int],
    compared: Comparison,
    index: Tensor,
    plain: Tensor,
    layers: Sequence[int],
    columns: dict[str, Any],
    n_draws: int,
    seed: int,
) -> tuple[Proof | None, list[str]]:
    """Add what the answers lose and keep, as columns; the proof, and the areas as notes."""
    shared = len(set(index.tolist()) & set(plain.tolist()))
    notes = [f"{shared} of the {len(index)} are among the {len(plain)} of most plain importance"]
    if n_draws == 0:
        return None, [*notes, UNASKED]
    named, baseline = compared.units(index), compared.units(plain)
    drawer = Draws(model, named, max(row.ids.shape[1] for row in rows), seed)
    most = min(drawer.most, len(named), len(baseline))
    if most == 0:
        return None, [*notes, "no proof: there are too few other neurons to compare with"]
    pool = [Unit(u.kind, u.layer, 0, 0 if u.inner >= 0 else -1) for u in _one_per_layer(compared, layers)]
    random = [drawer.draw(most) for _ in range(n_draws)]
    left = mask_and_keep(model, rows, answers, [named[:most], baseline[:most], *random], pool)
    columns |= _curves(left, len(named))
    for what, p, better in (("without", left.masked, "less"), ("with them alone", left.kept, "more")):
        areas = p.mean(-1)
        notes.append(
            f"mean probability {what}, over 1 to {most}: {float(areas[0]):.3f}, by plain importance "
            f"{float(areas[1]):.3f}, random {float(areas[2:].mean()):.3f} ({better} is better)"
        )
    ks = sizes(most)
    at = torch.tensor(ks) - 1
    what = "zeroing the first FFN neurons"
    distinct = different(random)
    return proof_of(left.drop[0, at], left.drop[2:, at], ks, what, drawer.matched, distinct=distinct), notes


def _one_per_layer(compared: Comparison, layers: Sequence[int]) -> list[Unit]:
    return [
        Unit("mlp.act", i, 0) if expert < 0 else Unit("expert.act", i, 0, 0)
        for i, expert in compared.keys
        if i in layers
    ]


def _curves(left: MaskKeep, rows: int) -> dict[str, Tensor]:
    """Columns of probability, filled up with NaN behind the last set."""
    found = {}
    for what, p in (("p without", left.masked), ("p alone", left.kept)):
        for n, word in ((0, ""), (1, ", plain"), (2, ", random")):
            curve = p[n] if n < 2 else p[2:].mean(0)
            found[f"{what}{word}"] = torch.cat([curve, torch.full((rows - len(curve),), float("nan"))])
    return found
