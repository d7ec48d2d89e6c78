"""Transformed neurons: FFN neurons that mean words of a set once a later attention layer has moved them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import annotated_types
import torch
from torch import Tensor

from cutaway.core.errors import ParameterError, UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.method import method
from cutaway.core.params import Count, Layers, Prompts, Sites, Target
from cutaway.core.proof import Check, Proof
from cutaway.models.handle import Model
from cutaway.ops.ablation import Ablation
from cutaway.ops.draws import Draws, proof_of, sizes
from cutaway.ops.parts import Group, take_apart, unpadded
from cutaway.ops.readout import FrozenReadout, Head
from cutaway.ops.transport import Transport, transports
from cutaway.ops.units import Unit
from cutaway.ops.watched import rounding
from cutaway.results.ranking import Ranking

ZEROED, ANSWERS = "zeroing the first FFN neurons", ("log p of the answers", "nats")
BLOCK_OF_LOGITS = 2**24  # numbers that one block of neurons may have over the vocabulary


@method(
    cites="yu2024arithmetic",
    example={"prompts": "#5 #9 #6 #7", "words": "#11, #12, #13, #14", "top": 8, "k": 4, "draws": 0},
)
def transformed_neurons(
    model: Model,
    prompts: Prompts,
    words: list[Target],
    layers: Layers | None = None,
    through: Sites | None = None,
    top: Count = 50,
    least: Count = 1,
    k: Count = 30,
    draws: Annotated[int, annotated_types.Ge(0)] = 5,
    seed: int = 0,
) -> Ranking:
    """FFN neurons by how many words of a set are among the tokens they raise most behind a later attention layer.

    A neuron's column goes through the value and output matrices of a deeper layer, or of some of its heads, and through
    the final norm and the head. No activation is used: neurons are found before any case is seen. The proof zeroes them
    in the prompts and reads what the model's own answers lose, against random neurons of the same layers.

    Source: Yu and Ananiadou (2024), "Interpreting arithmetic mechanism in large language models through comparative
    neuron analysis", section 6: the shallow neurons of arithmetic.

    Args:
        prompts: texts or ids whose answers the proof reads; the first also shows how the model's layers are built.
        words: the set of tokens, e.g. the digits.
        layers: layers whose neurons are tried; the shallower half when it is not given.
        through: attention layers (attn.out) or heads (attn.z) that they go through; when it is not given, all layers
            up to the middle one. A neuron goes through deeper ones than its own.
        top: how many tokens are looked at.
        least: how many of these must be words of the set.
        k: how many neurons are shown and taken away.
        draws: random draws of the proof, at least 5; 0 leaves it out.
        seed: of the draws.

    Returns:
        the first k neurons with their best way: the count, ``through`` which, ``by itself`` the count without it,
        ``lead`` by how many standard deviations over all tokens the set's are raised more than the average (it breaks
        ties), and the first tokens.

    Raises:
        ParameterError: the set is too large for ``top`` to say anything, no neuron reaches ``least``, or ``through``
        names nothing deeper. UnsupportedError: no neurons, values or readout that are understood.
    """
    rows = _rows(model, prompts)
    ids = list(dict.fromkeys(words))
    n_tokens = model.encoder.vocabulary_size
    if not ids or 2 * max(top, len(ids)) > n_tokens:
        found = f"{len(ids)} words and the first {top} of {n_tokens} tokens"
        raise ParameterError("parameters 'words' and 'top'", found, "neither may be none or more than half of all")
    middle = max(1, model.n_layers // 2)
    parts = take_apart(model, rows[0], 1, "neuron")
    chosen = range(middle) if layers is None else layers
    groups = [group for group in parts.groups if group.layer in chosen]
    if not groups:
        why = next((why for i, why in parts.missing.items() if i in chosen), f"layers {list(chosen)} have none")
        raise UnsupportedError(f"FFN neurons of {model.name}", why, "name other layers")
    units = _through(model, rows[0], middle, through)
    deeper = [unit for unit in units if unit.layer > groups[0].layer]
    if not deeper:
        given = ", ".join(map(str, units[:3]))
        found = f"{given} is not deeper than any neuron tried" if given else "no attention is seen in the layers behind"
        raise ParameterError("parameter 'through'", found, "name deeper ones")
    ways, missing, last = transports(model, rows[0], deeper)
    if not ways:
        raise UnsupportedError(f"attention of {model.name}", next(iter(missing.values())), "name other layers")
    groups = [group for group in groups if any(way.layer > group.layer for way in ways)]
    readout = Head(model).frozen(last.final, last.logits)
    tried = [_tried(group, ways, readout, ids, top) for group in groups]
    counts, leads = (torch.cat([getattr(each, name) for each in tried]) for name in ("count", "lead"))
    order = sorted(range(len(counts)), key=lambda i: (-int(counts[i]), -float(leads[i])))
    best = [i for i in order[:k] if int(counts[i]) >= least]
    if not best:
        found = f"the best of {len(counts)} neurons has {int(counts[order[0]])} of {top}"
        raise ParameterError(f"parameter 'least' ({least})", found, "ask for fewer")
    places = [(group, j) for group in groups for j in range(len(group))]
    named = [places[i][0].unit(places[i][1]) for i in best]
    which, alone = (torch.cat([getattr(each, name) for each in tried])[best] for name in ("way", "alone"))
    taken = [list(ways.values())[w] for w in which.tolist()]
    vectors = [way.carried(_columns(*places[i])) for i, way in zip(best, taken, strict=True)]
    proof, more = _proof(model, rows, named, draws, seed)
    reach = ", ".join(f"{m}: {int((counts >= m).sum()):,}" for m in (1, 2, 3, 5) if m <= top)
    return Ranking(
        title=f"FFN neurons of {model.name} that raise {len(ids)} given words behind later attention",
        items=[str(unit) for unit in named],
        scores=counts[best].float(),
        columns={
            "layer": [unit.layer for unit in named],
            "through": [str(way.unit) for way in taken],
            "by itself": alone.float(),
            "lead": leads[best],
            "tokens": [_tokens(model, readout, vector) for vector in vectors],
        },
        measure=f"words of the set among the first {top} tokens",
        order="given",
        check=Check(
            name="values, and what heads and neurons write, are found again in the run",
            value=max(*(way.error for way in ways.values()), *(group.writer.error for group in groups)),
            tolerance=rounding(model.dtype),
        ),
        proof=proof,
        notes=(
            f"of {len(counts):,} neurons through {len(ways)} ways, so many have at least so many words: {reach}; "
            f"by chance a way gives {top * len(ids) / n_tokens:.3g} on average",
            *(["of experts, those that the first prompt is routed to are tried"] if groups[0].expert >= 0 else []),
            *(f"{unit} is left out: {why}" for unit, why in missing.items()),
            *more,
        ),
    )


@dataclass(frozen=True)
class _Tried:
    """Of each neuron of a group, [n]: its best count, which way gave it, by what lead, and the count by itself."""

    count: Tensor
    way: Tensor
    lead: Tensor
    alone: Tensor


def _rows(model: Model, prompts: Any) -> list[Inputs]:
    batch = model.inputs(prompts)
    return [unpadded(batch)] if len(batch) == 1 else [batch.row(b) for b in range(len(batch))]


def _through(model: Model, inputs: Inputs, middle: int, through: Any) -> list[Unit]:
    if through is None:
        layers = range(1, min(middle + 1, model.n_layers))
        return [Unit("attn.out", i) for i in layers if model.layers[i].has("attn.out")]
    units = [u for site in model.expand(through, inputs) for u in Unit.of_site(site, model.anatomy(inputs))]
    wrong = [unit for unit in units if unit.kind not in ("attn.out", "attn.z")]
    if wrong:
        raise ParameterError("parameter 'through'", f"it names {wrong[0]}", "name attn.out or attn.z")
    return units


def _tried(group: Group, ways: dict[Unit, Transport], readout: FrozenReadout, ids: Sequence[int], top: int) -> _Tried:
    """Every neuron of a group through every way deeper than it; one block of neurons over the vocabulary at a time."""
    member = torch.zeros(len(readout.weight), dtype=torch.bool, device=readout.weight.device)
    member[list(ids)] = True
    parts = []
    for columns in _blocks(group, len(member)):
        alone, _ = _counted(readout, columns, member, top)
        count, lead = torch.full_like(alone, -1), torch.full_like(columns[:, 0], float("-inf"))
        best = torch.zeros_like(alone)
        for w, way in enumerate(ways.values()):
            if way.unit.layer <= group.layer:
                continue
            now, ahead = _counted(readout, way.carried(columns), member, top)
            better = (now > count) | ((now == count) & (ahead > lead))
            count, lead = torch.where(better, now, count), torch.where(better, ahead, lead)
            best = torch.where(better, w, best)
        parts.append((count, best, lead, alone))
    return _Tried(*(torch.cat(some).cpu() for some in zip(*parts, strict=True)))


def _blocks(group: Group, vocabulary: int) -> Iterator[Tensor]:
    """[b, d] what a unit of coefficient of each neuron writes, some neurons at a time."""
    for rows in group.rows.split(max(1, BLOCK_OF_LOGITS // vocabulary)):
        yield group.writer(rows.float()[:, None])[:, 0]


def _columns(group: Group, j: int) -> Tensor:
    """[1, d] what a unit of coefficient of one neuron writes."""
    return group.writer(group.rows[j : j + 1].float()[:, None])[:, 0]


def _counted(readout: FrozenReadout, v: Tensor, member: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """[b] words of the set among the first tokens that vectors [b, d] raise, and how far the set leads.

    The lead is that of its mean over the mean of all tokens, in standard deviations of all.
    """
    z = readout.project(v[:, None])[:, 0]
    best = z.topk(top)
    count = (member[best.indices] & (best.values > readout.floor(v[:, None]))).sum(-1)
    spread = z.std(-1).clamp_min(torch.finfo(z.dtype).tiny)
    return count, (z[:, member].mean(-1) - z.mean(-1)) / spread


def _tokens(model: Model, readout: FrozenReadout, vector: Tensor) -> str:
    return " ".join(model.decode(int(i)).strip() for i in readout.project(vector[:, None])[0, 0].topk(5).indices)


def _proof(
    model: Model, rows: list[Inputs], named: list[Unit], n_draws: int, seed: int
) -> tuple[Proof | None, list[str]]:
    """What log p of the model's own answers falls by on average without the neurons, against random ones."""
    if n_draws == 0:
        return None, ["no proof was asked for"]
    drawer = Draws(model, named, 1, seed)
    if drawer.most == 0:
        return None, ["no proof: there are too few other neurons to compare with"]
    ks = sizes(drawer.most)
    sets = drawer.sets(ks, n_draws)
    drop = torch.zeros(len(sets), dtype=torch.float64)
    for row in rows:
        ablation = Ablation(model, row, [int(model(row)[0, -1].argmax())])
        drop += (ablation.base().score - ablation(sets).score).double() / len(rows)
    n = len(ks)
    return proof_of(drop[:n], drop[n:].view(n_draws, n), ks, ZEROED, drawer.matched, ANSWERS, drawer.distinct), []
