"""Information flow: through which states, heads and MLPs the last state came to be."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cutaway.core.inputs import Inputs
from cutaway.core.method import method
from cutaway.core.params import Count, DrawCount, Image, Prompt, Target
from cutaway.core.proof import Check, Proof
from cutaway.core.site import Items
from cutaway.models.handle import Model
from cutaway.ops.ablation import Ablation
from cutaway.ops.draws import UNASKED, Draws, prove, sizes
from cutaway.ops.flow import Flow, Routes, flow, routes
from cutaway.ops.parts import unpadded
from cutaway.ops.units import Unit
from cutaway.ops.watched import rounding
from cutaway.results.graph import Graph

MIXES = 0.5  # how far above the state before its layer a mixer stands
WORTH = 0.1  # of the strongest head: heads below are not taken away


@method(cites="ferrando2024routes", example={"prompt": "#5 #9 #6 #7 #8"})
def information_flow(
    model: Model,
    prompt: Prompt,
    image: Image | None = None,
    position: int = -1,
    share: Literal["proximity", "projection"] = "proximity",
    target: Target | None = None,
    k: Count = 3,
    draws: DrawCount = 5,
    seed: int = 0,
) -> Graph:
    """The paths from the tokens to the last state, by the share of it that came along each, from one forward pass.

    Nodes are token states; edges are what stayed, what each head brought from each position, and what the MLP added.
    Every state is shared out among its addends, nothing is cut off; the picture alone shows the strongest. Mixers
    (linear attention, state spaces) do not say what they read: paths end there. The proof zeroes the heads that carry
    most, and compares with random ones.

    Source: Ferrando and Voita (2024), "Information flow routes: automatically interpreting language models at scale".

    Args:
        prompt: text or token ids.
        image: an image that goes with the prompt.
        position: whose last state is traced back, counting the prompt's tokens; -1 is the last.
        share: of an addend z in a sum y: by how much z brings the rest nearer to y, max(0, |y| - |y - z|) in the L1
            norm over the sum of these; or its projection <z, y> / <y, y>, which may be negative.
        target: the token whose log-probability the proof reads; the model's answer when it is not given.
        k: how many heads the proof takes away at most, of those with at least a tenth of the strongest.
        draws: random draws of the proof, at least 5; 0 leaves it out.
        seed: of the draws.

    Returns:
        a graph over layers and positions; ``weight`` is the share of the last state that came along an edge, and
        ``contribution`` the edge's share of the state that it ends in.

    Raises:
        UnsupportedError: layers that do not add to the residual stream, or heads that cannot be told apart.
        SiteRangeError: no such position.
    """
    inputs = unpadded(model.inputs(prompt, image))
    n = inputs.ids.shape[1]
    (place,) = inputs.select(Items.of(position), f"position {position}")[0]
    found = flow(model, inputs, share)
    through = routes(found, place)
    nodes = _nodes(found, through, inputs)
    edges = _edges(found, through, nodes)
    strongest = _strongest(through)
    proof, notes = _proof(model, inputs, place, strongest, target, k, draws, seed)
    start = through.states[0]
    shown = sorted(range(n), key=lambda s: -float(start[s]))[:5]
    return Graph(
        title=f"flow into {inputs.tokens[0][place]!r} of {model.name}",
        nodes=[node.name for node in nodes.kept],
        source=[edge.source for edge in edges],
        target=[edge.target for edge in edges],
        weight=torch.tensor([edge.weight for edge in edges]),
        layer=torch.tensor([float(node.height) for node in nodes.kept]),
        node_columns={
            "token": [inputs.tokens[0][node.position] for node in nodes.kept],
            "position": [node.position for node in nodes.kept],
            "through": torch.tensor([node.through for node in nodes.kept]),
        },
        edge_columns={
            "kind": [edge.kind for edge in edges],
            "head": [edge.head for edge in edges],
            "contribution": torch.tensor([edge.contribution for edge in edges]),
        },
        measure="share of the last state",
        about={"tokens": list(inputs.tokens[0])},
        check=Check(
            name="the addends of every state sum to it",
            value=found.error,
            tolerance=rounding(model.dtype),
            sentence="relative to the largest number of the state",
        ),
        proof=proof,
        notes=(
            "tokens it came from: " + ", ".join(f"{inputs.tokens[0][s]!r} {float(start[s]):.3f}" for s in shown),
            f"biases: {through.constant:.3f}",
            *_mixed(through),
            "heads it came through: " + ", ".join(f"{unit} {weight:.3f}" for unit, weight in strongest[:5]),
            *notes,
        ),
    )


class _Node(NamedTuple):
    name: str
    height: float
    position: int
    through: float


class _Nodes(NamedTuple):
    """The nodes that something flows through; ``at`` finds one by (height, position), a mixer's half a step higher."""

    kept: list[_Node]
    at: dict[tuple[float, int], int]


class _Edge(NamedTuple):
    source: int
    target: int
    weight: float
    kind: str
    head: int
    contribution: float


def _nodes(found: Flow, through: Routes, inputs: Inputs) -> _Nodes:
    kept: list[_Node] = []
    n_layers = len(found.layers)
    for i in range(n_layers + 1):
        kind, layer = ("resid_pre", i) if i < n_layers else ("resid_post", i - 1)
        kept += [
            _Node(f"L{layer}.{kind}@{t}", 2 * i, t, float(w)) for t, w in enumerate(through.states[i]) if float(w) != 0
        ]
        if i < n_layers:
            kept += [
                _Node(f"L{i}.resid_mid@{t}", 2 * i + 1, t, float(w))
                for t, w in enumerate(through.middle[i])
                if float(w) != 0
            ]
        if i in through.mixer:
            kept += [
                _Node(f"L{i}.attn.out@{t}", 2 * i + MIXES, t, float(w))
                for t, w in enumerate(through.mixer[i])
                if float(w) != 0
            ]
    return _Nodes(kept, {(node.height, node.position): n for n, node in enumerate(kept)})


def _edges(found: Flow, through: Routes, nodes: _Nodes) -> list[_Edge]:
    """Every edge along which something flows, in the order of the layers."""
    edges: list[_Edge] = []
    for i, sums in enumerate(found.layers):
        low, high = 2 * i, 2 * i + 2
        middle = 2 * i + 1 if sums.after is not None else high

        def add(a: tuple[float, int], b: tuple[float, int], weight: Tensor, kind: str, head: int, own: Tensor) -> None:
            if float(weight) != 0:
                edges.append(_Edge(nodes.at[a], nodes.at[b], float(weight), kind, head, float(own)))

        for t in range(len(sums.stays)):
            add((low, t), (middle, t), through.stays[i, t], "stays", -1, sums.stays[t])
            if sums.heads is not None:
                for s, h in through.heads[i][t].nonzero().tolist():
                    add((low, s), (middle, t), through.heads[i][t, s, h], "head", h, sums.heads[t, s, h])
            if sums.mixer is not None:
                add((low + MIXES, t), (middle, t), through.mixer[i][t], "mixer", -1, sums.mixer[t])
            if sums.after is not None:
                add((middle, t), (high, t), through.after[i][t], "stays", -1, sums.after[t])
            if sums.mlp is not None:
                below = middle if sums.after is not None else low
                add((below, t), (high, t), through.mlp[i][t], "mlp", -1, sums.mlp[t])
    return edges


def _mixed(through: Routes) -> list[str]:
    """What of the flow ends in mixers."""
    if not through.mixer:
        return []
    total = sum(float(weights.sum()) for weights in through.mixer.values())
    return [f"mixers, which do not say from which tokens: {total:.3f}"]


def _strongest(through: Routes) -> list[tuple[Unit, float]]:
    """Heads by what came through them, most first."""
    found = [
        (Unit("attn.z", i, h), float(weight))
        for i, weights in sorted(through.heads.items())
        for h, weight in enumerate(weights.sum((0, 1)))
    ]
    return sorted(found, key=lambda each: -abs(each[1]))


def _proof(
    model: Model,
    inputs: Inputs,
    place: int,
    strongest: list[tuple[Unit, float]],
    target: int | None,
    k: int,
    n_draws: int,
    seed: int,
) -> tuple[Proof | None, list[str]]:
    if n_draws == 0:
        return None, [UNASKED]
    if place != inputs.ids.shape[1] - 1:
        return None, ["no proof: answers are read at the last position alone"]
    units = [unit for unit, weight in strongest[:k] if weight >= WORTH * strongest[0][1] > 0]
    drawer = Draws(model, units, inputs.ids.shape[1], seed)
    if drawer.most == 0:
        return None, ["no proof: there are too few other heads to compare with"]
    answer = int(model(inputs)[0, -1].argmax()) if target is None else target
    ablation = Ablation(model, inputs, [answer])
    proof = prove(ablation, drawer, sizes(drawer.most), n_draws, "zeroing the heads that most comes through")
    return proof, []
