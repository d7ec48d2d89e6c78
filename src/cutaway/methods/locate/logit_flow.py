"""Logit flow: through which layers and positions the answer's score came together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cutaway.core.inputs import Inputs
from cutaway.core.method import method
from cutaway.core.params import Count, DrawCount, Image, Prompt, Target
from cutaway.core.proof import Check, Proof
from cutaway.models.handle import Model
from cutaway.ops.ablation import Ablation
from cutaway.ops.draws import ROOM, UNASKED, WORTH, different, proof_of, sizes
from cutaway.ops.importance import refuse_same
from cutaway.ops.parts import take_apart, unpadded
from cutaway.ops.subkeys import INSERTED, find_values, totals
from cutaway.ops.units import Unit
from cutaway.ops.watched import rounding
from cutaway.results.grid import Grid

FLOWS = ("value: attention", "value: FFN", "query: attention", "query: FFN, embedding")
VALUE_ATTENTION, VALUE_FFN, QUERY_ATTENTION, QUERY_FFN = range(4)
NAMED = 10  # cells that the proof takes away at most


class Cell(NamedTuple):
    """What can be taken away with a cell: what heads bring "from" a position, or "attn.out" / "mlp.out" at one."""

    kind: str
    layer: int
    position: int

    def strength(self, values: Tensor) -> float:
        """What flows through it."""
        flows = {"from": [VALUE_ATTENTION], "attn.out": [QUERY_ATTENTION], "mlp.out": [VALUE_FFN, QUERY_FFN]}
        return float(values[flows[self.kind], 1 + self.layer, self.position].sum())


class Flow(NamedTuple):
    """[flow, 1 + layer, position] the flow of one token's score, the embedding first, and what it was made of.

    ``added`` is what the value neurons add, ``constants`` what of it no part brought, ``error`` what the sums miss.
    """

    values: Tensor
    added: float
    constants: float
    error: float
    left_out: list[str]


@method(cites=("yu2025back", "yu2024neuron"), example={"prompt": "#5 #9 #6 #7 #8", "most": 5})
def logit_flow(
    model: Model,
    prompt: Prompt,
    image: Image | None = None,
    target: Target | None = None,
    versus: Target | None = None,
    most: Count = 100,
    draws: DrawCount = 5,
    curve: bool = True,
    seed: int = 0,
) -> Grid:
    """How much of the answer's log-probability came through each layer and position, as value and as query, in nats.

    *Value* is what value neurons add at the last position: attention neurons at the source position that they read,
    FFN neurons at the last one. *Query* hands the same nats back, by the shares of their coefficients, to the attention
    and FFN outputs of earlier layers at the position that was read, and to the embedding. The proof takes the strongest
    cells away, against random cells.

    Source: Yu, Belinkov and Ananiadou (2025), "Back attention: understanding and enhancing multi-hop reasoning in large
    language models"; the formulas are a reconstruction.

    Args:
        prompt: text or token ids.
        image: an image that goes with the prompt.
        target: the token whose log-probability is followed; the model's own answer when it is not given.
        versus: a rival token: the flow of the target minus that of the rival, each with value neurons of its own.
        most: how many value neurons of each kind (attention, FFN) are followed, for each token.
        draws: random draws of the proof, at least 5; 0 leaves it out.
        curve: prove 1, 3 and 10 cells, or the largest number alone.
        seed: of the draws.

    Returns:
        nats [flow, layer, position]; the row "embed" holds what the embedding brought, and image features that a model
        adds between layers.

    Raises:
        UnsupportedError: no value neuron whose reading is understood, or layers that do not add to the residual stream.
    """
    batch = unpadded(model.inputs(prompt, image))
    token = int(model(batch)[0, -1].argmax()) if target is None else target
    refuse_same(token, versus)
    tokens = [token] if versus is None else [token, versus]
    flows = [_flow(model, batch, each, most) for each in tokens]
    values = flows[0].values if versus is None else flows[0].values - flows[1].values
    proof, more = _proof(model, batch, token, versus, values, draws, curve, seed)
    rival = "" if versus is None else f" against {model.decode(versus).strip()!r}"
    return Grid(
        title=f"flow of {model.decode(token).strip()!r}{rival} through {model.name}",
        values=values.cpu(),
        axes=("flow", "layer", "position"),
        measure="flow" if versus is None else "flow of the target minus the rival's",
        unit="nats",
        labels={"flow": FLOWS, "layer": ("embed", *range(model.n_layers)), "position": tuple(batch.tokens[0])},
        check=Check(
            name="queries and constants sum to what the value neurons add",
            value=max(flow.error for flow in flows),
            tolerance=rounding(model.dtype),
        ),
        proof=proof,
        notes=(*_notes(model, tokens, flows), *more),
    )


def _flow(model: Model, batch: Inputs, token: int, most: int) -> Flow:
    """The flow of one token's log-probability."""
    neurons = find_values(model, batch, token, None, most)
    length = batch.ids.shape[1]
    values = torch.full((4, 1 + model.n_layers, length), float("nan"), device=model.device)
    values[:, 1:] = 0.0
    values[QUERY_FFN, 0] = 0.0
    for unit, score in zip(neurons.units, neurons.scores.tolist(), strict=True):
        flow = VALUE_ATTENTION if unit.kind == "attn.z" else VALUE_FFN
        values[flow, 1 + unit.layer, unit.source if unit.source >= 0 else length - 1] += score
    parts, at = take_apart(model, batch, neurons.positions, "layer"), list(neurons.positions)
    values[QUERY_FFN, 0, at] = (neurons.gradient("embed", -1) * parts.layers[0].x).sum(-1)
    for i, layer in enumerate(parts.layers):
        if layer.inserted is not None:
            values[QUERY_FFN, 0, at] += (neurons.gradient(INSERTED, i - 1) * layer.inserted).sum(-1)
        for flow, kind, part in ((QUERY_ATTENTION, "attn.out", layer.attn), (QUERY_FFN, "mlp.out", layer.mlp)):
            if part is not None:
                values[flow, 1 + i, at] = (neurons.gradient(kind, i) * part).sum(-1)
    added, constants = float(neurons.scores.sum()), totals(parts, neurons).shared["constants"]
    asked_back = float(values[QUERY_ATTENTION:].nansum()) + constants
    error = max(abs(asked_back - added) / added, parts.identity_error)
    return Flow(values, added, constants, error, neurons.left_out)


def _notes(model: Model, tokens: Sequence[int], flows: Sequence[Flow]) -> Iterator[str]:
    for token, flow in zip(tokens, flows, strict=True):
        attention, ffn = (float(flow.values[i].nansum()) for i in (VALUE_ATTENTION, VALUE_FFN))
        embedding = float(flow.values[QUERY_FFN, 0].sum())
        yield (
            f"{model.decode(token).strip()!r}: value neurons add {flow.added:.4g} (attention {attention:.4g}, FFN "
            f"{ffn:.4g}), of which the embedding brought {embedding:.4g} and constants {flow.constants:.4g}"
        )
        yield from flow.left_out
    if len(flows) == 2:
        both = torch.minimum(flows[0].values, flows[1].values).nan_to_num(-1.0)
        best = int(both.argmax())
        kind, layer, position = (int(i) for i in torch.unravel_index(torch.tensor(best), both.shape))
        if layer and float(both.flatten()[best]) > 0:
            yield (
                f"the cell that raises both most: {FLOWS[kind]}, layer {layer - 1}, position {position} "
                f"({float(flows[0].values[kind, layer, position]):.3g} and "
                f"{float(flows[1].values[kind, layer, position]):.3g})"
            )


def _proof(
    model: Model, inputs: Inputs, token: int, versus: int | None, values: Tensor, n_draws: int, curve: bool, seed: int
) -> tuple[Proof | None, list[str]]:
    """The strongest cells taken away, against random cells of the same flow, of the same layer where it has others."""
    if n_draws == 0:
        return None, [UNASKED]
    pool = _pool(model, values.shape[-1])
    strength = {cell: cell.strength(values) for cell in pool}
    floor = WORTH * max(strength.values(), default=0.0)
    named = [c for c in sorted(pool, key=lambda c: -strength[c]) if strength[c] > max(0.0, floor)][:NAMED]
    sizes_of = Counter(cell.kind for cell in pool)
    while any(ROOM * n > sizes_of[kind] for kind, n in Counter(c.kind for c in named).items()):
        named.pop()
    if not named:
        return None, ["no proof: nothing flows, or there are too few cells to compare with"]
    generator = torch.Generator().manual_seed(seed)
    ks = sizes(len(named)) if curve else [len(named)]
    sets = [named[:k] for k in ks]
    sets += [_drawn(named[:k], pool, generator) for _ in range(n_draws) for k in ks]
    ablation = Ablation(model, inputs, [token], rival=versus)
    found = ablation([[unit for cell in some for unit in _units(model, cell)] for some in sets])
    drop = float(ablation.base().score[0]) - found.score.double()
    random = drop[len(ks) :].view(n_draws, len(ks))
    what, apart = "taking the strongest cells away", different(sets[2 * len(ks) - 1 :: len(ks)])
    return proof_of(drop[: len(ks)], random, ks, what, "kind", ablation.measures, apart), []


def _pool(model: Model, length: int) -> list[Cell]:
    """The cells that can reach the last position."""
    found = []
    for i, plan in enumerate(model.layers):
        for p in range(length):
            reaches = p == length - 1 or i < model.n_layers - 1
            found += [Cell("from", i, p)] if plan.has("attn.z") else []
            found += [Cell(kind, i, p) for kind in ("attn.out", "mlp.out") if plan.has(kind) and reaches]
    return found


def _drawn(named: Sequence[Cell], pool: Sequence[Cell], generator: torch.Generator) -> list[Cell]:
    """As many other cells, each of the kind of one that is named, and of its layer where that has others."""
    taken = set(named)
    for cell in named:
        left = [c for c in pool if c.kind == cell.kind and c not in taken]
        of_layer = [c for c in left if c.layer == cell.layer] or left
        taken.add(of_layer[int(torch.randint(len(of_layer), (), generator=generator))])
    return [c for c in pool if c in taken and c not in named]


def _units(model: Model, cell: Cell) -> list[Unit]:
    """The components of a cell."""
    if cell.kind != "from":
        return [Unit(cell.kind, cell.layer, at=cell.position)]
    attention = model.layers[cell.layer].attention
    return [Unit("attn.z", cell.layer, h, -1, cell.position) for h in range(attention.heads if attention else 0)]
