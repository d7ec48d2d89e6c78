"""What switched value neurons on: their coefficients as linear maps of what was added up in the stream that they read.

    attention neuron (l, h, k) from p:   alpha v_k[p]        reads x_l at the source position p
    FFN neuron (l, k):                   m_k                 reads the state between attention and MLP at the last one

    coefficient = sum over parts of (sub-key . part) + constant;   share of a part = (sub-key . part) / coefficient

A part is what an earlier layer, head or neuron added at that position. With the value neurons' scores as weights, all
of them that read one state become one vector of the residual space, and any part's score is one product with it.

Source: Yu and Ananiadou (2024), "Neuron-level knowledge attribution in large language models", section 3.3.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cutaway.core.errors import ParameterError, UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.site import Items
from cutaway.core.trace import Trace
from cutaway.ops.draws import WORTH
from cutaway.ops.importance import Goal, top_elements
from cutaway.ops.parts import Level, Parts, take_apart
from cutaway.ops.readers import Keys, MlpReaders, expert_readers, mlp_readers, value_reader, value_row
from cutaway.ops.readout import Head
from cutaway.ops.units import Unit
from cutaway.ops.watched import WatchedModel

Places = dict[tuple[int, str], dict[int, list[int]]]
"""By layer and kind, by position: places of value neurons."""
INSERTED = "inserted"  # kind of what the model adds behind a layer
VALUE_LEVELS: dict[str, Level] = {"attn.z": "attention-neuron", "mlp.act": "neuron"}


@dataclass(frozen=True)
class Read:
    """The value neurons of one layer that read one state at one position.

    Attributes:
        layer, position: where. mid: the state is the one between attention and MLP, else the one before the layer.
        members: their places among all. keys: how their coefficients are made of parts. state: [d] what they read.
        again: their coefficients [b, k] at other states [b, d]; attention weights stay as they were.
    """

    layer: int
    position: int
    mid: bool
    members: tuple[int, ...]
    keys: Keys
    state: Tensor
    again: Callable[[Tensor], Tensor]

    def sees(self, kind: str, layer: int) -> bool:
        """Whether what a part of that kind added in a layer is in the state."""
        return layer < self.layer or (self.mid and layer == self.layer and kind.startswith("attn"))


@dataclass(frozen=True)
class ValueNeurons:
    """n value neurons of one run, with what they read.

    Attributes:
        units: their places. scores: [n] what each adds to the target. coefficients: [n] of the run.
        reads: what they read, state by state. missing: why units of a layer are left out, by the layer's text.
    """

    units: tuple[Unit, ...]
    scores: Tensor
    coefficients: Tensor
    reads: tuple[Read, ...]
    missing: dict[str, str] = field(default_factory=dict)

    def signed(self, sign: float) -> ValueNeurons:
        """The same, scored by their coefficients times ``sign``."""
        return replace(self, scores=self.coefficients * sign)

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions that are read, in order."""
        return tuple(sorted({read.position for read in self.reads}))

    @property
    def slopes(self) -> Tensor:
        """[n] score per unit of coefficient; 0 where the coefficient is."""
        return torch.where(self.coefficients == 0, torch.zeros_like(self.scores), self.scores / self.coefficients)

    def gradient(self, kind: str, layer: int) -> Tensor:
        """[R, d] at the positions read: the product with what a part added is its score."""
        g = torch.zeros(len(self.positions), self.reads[0].state.shape[0], device=self.coefficients.device)
        slopes = self.slopes
        for read in self.reads:
            if read.sees(kind, layer):
                g[self.positions.index(read.position)] += slopes[list(read.members)] @ read.keys.vectors
        return g

    def contributions(self, kind: str, layer: int, vectors: Tensor) -> Tensor:
        """[b, n] what parts [b, R, d] of one layer brought to each coefficient."""
        found = torch.zeros(len(vectors), len(self.units), device=vectors.device)
        for read in self.reads:
            if read.sees(kind, layer):
                part = vectors[:, self.positions.index(read.position)]
                found[:, list(read.members)] = part @ read.keys.vectors.T
        return found

    def removed(self, kind: str, layer: int, vectors: Tensor) -> Tensor:
        """[b, n] how much of each coefficient goes when a part is taken out of the states that are read."""
        found = torch.zeros(len(vectors), len(self.units), device=vectors.device)
        for read in self.reads:
            if read.sees(kind, layer):
                without = read.state - vectors[:, self.positions.index(read.position)]
                found[:, list(read.members)] = read.again(read.state[None]) - read.again(without)
        return found

    @property
    def left_out(self) -> list[str]:
        """A sentence per reason why some are left out."""
        by_reason: dict[str, list[str]] = defaultdict(list)
        for name, why in self.missing.items():
            by_reason[why].append(name)
        return [f"value neurons of {', '.join(names)} are left out: {why}" for why, names in by_reason.items()]

    @property
    def constants(self) -> Tensor:
        """[n] what of each coefficient no part brought: biases, and the shift of the norm."""
        found = torch.zeros_like(self.coefficients)
        for read in self.reads:
            found[list(read.members)] = read.keys.constant
        return found


def find_values(
    model: WatchedModel,
    inputs: Inputs,
    token: int,
    rival: int | None,
    most: int,
    kinds: Sequence[str] = (*VALUE_LEVELS,),
) -> ValueNeurons:
    """The attention neurons (kind "attn.z") and FFN neurons ("mlp.act") that raise a token most, so many of each.

    Those that add less than a thousandth of the best of their kind are left out.
    """
    head, found = Head(model), []
    for kind in kinds:
        parts = take_apart(model, inputs, 1, VALUE_LEVELS[kind])
        if not parts.groups:
            why = next(iter(parts.missing.values()), "no layer has them")
            found.append(ValueNeurons((), torch.empty(0), torch.empty(0), (), {kind: why}))
            continue
        goal = Goal.of(head.frozen(parts.final, parts.logits), [token], rival)
        best = top_elements(parts, goal, most)
        floor = max(0.0, WORTH * float(best.scores.max()))
        keep = [i for i, score in enumerate(best.scores.tolist()) if score > floor]
        found.append(read_values(model, inputs, [best.units[i] for i in keep], best.scores[keep]))
    together = _joined(found)
    if not together.units:
        why = "; ".join(together.left_out) or "nothing raises the answer"
        raise UnsupportedError(f"value neurons of {model.name}", f"none can be read ({why})", "")
    return together


def read_values(model: WatchedModel, inputs: Inputs, units: Sequence[Unit], scores: Tensor) -> ValueNeurons:
    """What value neurons read in the run on ``inputs``; those that are not understood are left out, with the reason.

    Raises:
        ParameterError: units that are neither attention neurons from a position nor FFN neurons.
    """
    last = len(inputs.real[0]) - 1
    places: Places = defaultdict(lambda: defaultdict(list))
    for i, unit in enumerate(units):
        attention = unit.kind == "attn.z" and unit.inner >= 0 and unit.source >= 0
        if not attention and unit.kind not in ("mlp.act", "expert.act"):
            raise ParameterError(
                f"value neuron '{unit}'", "it is none", "name 'L3.mlp.act[7]' or 'L3.attn.z[5/17] from 2'"
            )
        places[unit.layer, unit.kind][unit.source if attention else last].append(i)
    trace = model.trace(inputs, want=_wanted(model, places), stop=True)
    found: list[Read] = []
    missing: dict[str, str] = {}
    for (layer, kind), by_position in sorted(places.items()):
        try:
            read = {"attn.z": _attention, "mlp.act": _mlp, "expert.act": _experts}[kind]
            found += read(model, layer, trace, by_position, units)
        except UnsupportedError as error:
            missing[f"L{layer}.{kind}"] = error.found
    return _kept(units, scores, found, missing)


def _joined(some: Sequence[ValueNeurons]) -> ValueNeurons:
    """Several sets of value neurons as one."""
    reads: list[Read] = []
    start = 0
    for values in some:
        reads += [_moved(read, tuple(i + start for i in read.members)) for read in values.reads]
        start += len(values.units)
    return ValueNeurons(
        tuple(unit for values in some for unit in values.units),
        torch.cat([values.scores for values in some]),
        torch.cat([values.coefficients for values in some]),
        tuple(reads),
        {name: why for values in some for name, why in values.missing.items()},
    )


def _kept(units: Sequence[Unit], scores: Tensor, reads: Sequence[Read], missing: dict[str, str]) -> ValueNeurons:
    """The value neurons that were understood."""
    kept = sorted(i for read in reads for i in read.members)
    new = {i: n for n, i in enumerate(kept)}
    coefficients = torch.zeros(len(kept), device=scores.device)
    moved = [_moved(read, tuple(new[i] for i in read.members)) for read in reads]
    for read in moved:
        coefficients[list(read.members)] = read.again(read.state[None])[0].to(scores.device)
    return ValueNeurons(tuple(units[i] for i in kept), scores[kept], coefficients, tuple(moved), missing)


def _moved(read: Read, members: tuple[int, ...]) -> Read:
    return Read(read.layer, read.position, read.mid, members, read.keys, read.state, read.again)


def _wanted(model: WatchedModel, places: Places) -> list[str]:
    """The sites that show what the units read."""
    want = []
    for (layer, kind), by_position in places.items():
        plan = model.layers[layer]
        if kind == "attn.z":
            at = f"@{Items.of(sorted(by_position))}"
            want += [f"L{layer}.{site}{at}" for site in ("resid_pre", "attn.v")] + [f"L{layer}.attn.pattern@-1"]
        else:
            inside = ("mlp.in", "mlp.act") if kind == "mlp.act" else ("expert.gate", "expert.act")
            want += [f"L{layer}.{site}@-1" for site in (_state(plan), *inside) if plan.has(site)]
    return want


def _state(plan: Any) -> str:
    """The state that a layer's MLP reads."""
    return "resid_mid" if plan.has("resid_mid") else "resid_pre"


def _attention(
    model: WatchedModel, layer: int, trace: Trace, by_position: dict[int, list[int]], units: Sequence[Unit]
) -> list[Read]:
    at = f"@{Items.of(sorted(by_position))}"
    x, v = (trace[f"L{layer}.{kind}{at}"][0] for kind in ("resid_pre", "attn.v"))
    pattern = trace[f"L{layer}.attn.pattern@-1"][0, :, 0].float()
    reader, plan = value_reader(model, layer, x, v), model.layers[layer]
    found = []
    for row, (position, members) in enumerate(sorted(by_position.items())):
        index = [value_row(plan, units[i].number, units[i].inner) for i in members]
        alpha = pattern[[units[i].number for i in members], position]
        keys = reader.keys(index, row)

        def again(states: Tensor, index: list[int] = index, alpha: Tensor = alpha) -> Tensor:
            return reader.again(states, index) * alpha

        scaled = Keys(keys.vectors * alpha[:, None], keys.constant * alpha)
        found.append(Read(layer, position, False, tuple(members), scaled, reader.states[row], again))
    return found


def _mlp(
    model: WatchedModel, layer: int, trace: Trace, by_position: dict[int, list[int]], units: Sequence[Unit]
) -> list[Read]:
    plan = model.layers[layer]
    ((position, members),) = by_position.items()
    if not plan.has("mlp.in"):
        raise UnsupportedError(f"the MLP of layer {layer}", plan.refused["mlp.in"], "")
    kinds = (_state(plan), "mlp.in", "mlp.act")
    readers = mlp_readers(model, layer, *(trace[f"L{layer}.{kind}@-1"][0] for kind in kinds))
    index = [units[i].number for i in members]

    def again(states: Tensor) -> Tensor:
        return readers.again(states, index)

    state = readers.up.states[0]
    return [Read(layer, position, plan.has("resid_mid"), tuple(members), readers.keys(index, 0), state, again)]


def _experts(
    model: WatchedModel, layer: int, trace: Trace, by_position: dict[int, list[int]], units: Sequence[Unit]
) -> list[Read]:
    """Expert by expert; the router's weight stays as it was."""
    plan = model.layers[layer]
    ((position, everyone),) = by_position.items()
    x, gate, act = (trace[f"L{layer}.{kind}@-1"][0] for kind in (_state(plan), "expert.gate", "expert.act"))
    found = []
    for expert in sorted({units[i].number for i in everyone}):
        members = [i for i in everyone if units[i].number == expert]
        index, weight = [units[i].inner for i in members], float(gate[0, expert])
        if weight == 0.0:
            raise UnsupportedError(f"expert {expert} of layer {layer}", "the last position is not sent to it", "")
        readers = expert_readers(model, layer, expert, x, act[:, expert])
        keys = readers.keys(index, 0)

        def again(
            states: Tensor, readers: MlpReaders = readers, index: list[int] = index, weight: float = weight
        ) -> Tensor:
            return readers.again(states, index) * weight

        scaled = Keys(keys.vectors * weight, keys.constant * weight)
        found.append(Read(layer, position, plan.has("resid_mid"), tuple(members), scaled, readers.up.states[0], again))
    return found


class Totals(NamedTuple):
    """Scores by where they came from ("embedding", "attention", "MLPs", "constants"; where a model has such, "image
    features between layers"), and how well they add up.

    ``error`` is the score that the sums of parts miss or have too much, as a share of all.
    """

    shared: dict[str, float]
    error: float


def totals(parts: Parts, values: ValueNeurons) -> Totals:
    """Every coefficient as the sum of what the embedding, all layers and the constants brought."""
    slopes = values.slopes
    brought = {
        "embedding": [values.contributions("embed", -1, parts.layers[0].x[None])[0]],
        "attention": [],
        "MLPs": [],
    }
    for i, layer in enumerate(parts.layers):
        for name, kind, part in (("attention", "attn.out", layer.attn), ("MLPs", "mlp.out", layer.mlp)):
            if part is not None:
                brought[name].append(values.contributions(kind, i, part[None])[0])
        if layer.inserted is not None:
            between = values.contributions(INSERTED, i - 1, layer.inserted[None])[0]
            brought.setdefault("image features between layers", []).append(between)
    brought["constants"] = [values.constants]
    everything = torch.stack([some for of_kind in brought.values() for some in of_kind])
    gap = (everything.sum(0) - values.coefficients) * slopes
    shared = {name: float(sum((some * slopes).sum() for some in of_kind)) for name, of_kind in brought.items()}
    whole = float(values.scores.abs().sum())
    return Totals(shared, float(gap.abs().sum()) / (whole or 1.0))
