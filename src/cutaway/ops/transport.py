"""Vectors carried through the value and output matrices of heads, the norms on the way frozen at a run's own states.

    carried(v)  = n_out( W_O W_V n_in(v) )                              what a head makes of v, attention left out
    brought(p)  = alpha[p] (k . carried(x[p]) + constant)               what it brings from p to a coefficient of key k

Both are linear in what was added up in x[p], so the second is shared out among the parts of the stream exactly.

Source: Yu and Ananiadou (2024), "Interpreting arithmetic mechanism in large language models through comparative neuron
analysis", for the transport.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway.core.errors import UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.ops.parts import Group, Parts, take_apart
from cutaway.ops.readers import Keys, Reader, value_reader, value_row
from cutaway.ops.subkeys import Read, ValueNeurons
from cutaway.ops.units import Unit
from cutaway.ops.watched import WatchedModel

NOTHING = 1e-6  # of the most that a vector could be read as: rounding


@dataclass(frozen=True)
class Transport:
    """The way through one head (``attn.z``), or all heads of a layer (``attn.out``), in one run.

    Attributes:
        unit: which. reader: of the layer's values, at all positions. index: [m] the numbers of it that heads take.
        group: what the heads bring from every position to the last. rows: [m, d] what the numbers are written as.
        pattern: [head, position] attention from the last position.
    """

    unit: Unit
    reader: Reader
    index: Tensor
    group: Group
    rows: Tensor
    pattern: Tensor

    @property
    def error(self) -> float:
        """The larger error of both ways."""
        return max(self.reader.error, self.group.writer.error)

    def carried(self, v: Tensor, position: int = -1) -> Tensor:
        """[b, d] what vectors [b, d], added up at a position, would be written as; without attention weights."""
        keys = self.reader.keys(self.index.tolist(), position).vectors
        numbers = v @ keys.T
        size = v.norm(dim=-1)[:, None] * keys.norm(dim=-1)
        numbers = torch.where(numbers.abs() > NOTHING * size, numbers, 0.0)  # what is not read is not written, exactly
        return self.group.writer((numbers @ self.rows)[:, None])[:, 0]

    def brought(self, key: Tensor) -> ValueNeurons:
        """What one head brings from each position to a coefficient that reads the last state by ``key`` [d].

        As a set of coefficients, one per position, with how the parts of the stream there made them.
        """
        head, reader = self.unit.number, self.reader
        numbers = self.rows @ self.group.writer.pull(key[None])[0]
        vector, constant = numbers @ reader.weight[self.index].float(), numbers @ reader.constant[self.index]
        back = vector.expand_as(reader.states)
        keys = back if reader.norm is None else reader.norm.pull(back)
        reads = []
        for p, alpha in enumerate(self.pattern[head]):

            def again(states: Tensor, alpha: Tensor = alpha) -> Tensor:
                return (reader.again(states, self.index.tolist()) @ numbers)[:, None] * alpha

            scaled = Keys(keys[p][None] * alpha, constant[None] * alpha)
            reads.append(Read(self.unit.layer, p, False, (p,), scaled, reader.states[p], again))
        units = tuple(self.unit._replace(source=p) for p in range(len(reads)))
        found = torch.stack([read.keys.vectors[0] @ read.state + read.keys.constant[0] for read in reads])
        return ValueNeurons(units, found, found, tuple(reads))

    def written(self) -> Tensor:
        """[position, d] what one head really brought from each position in the run."""
        elements = [self.group.element(self.unit._replace(source=p)) for p in range(self.pattern.shape[1])]
        return self.group.vectors(torch.tensor(elements, device=self.rows.device))[:, 0]


def transports(
    model: WatchedModel, inputs: Inputs, units: Sequence[Unit]
) -> tuple[dict[Unit, Transport], dict[Unit, str], Parts]:
    """The ways through heads or whole attention layers, why some are not understood, and the last position's parts."""
    layers = sorted({unit.layer for unit in units if model.layers[unit.layer].has("resid_pre")})
    parts = take_apart(model, inputs, 1, "head-position", extra=[f"L{i}.resid_pre" for i in layers])
    groups, trace = {group.layer: group for group in parts.groups}, parts.trace
    found: dict[Unit, Transport] = {}
    missing: dict[Unit, str] = {}
    readers: dict[int, Reader] = {}
    for unit in units:
        i = unit.layer
        if i not in groups or trace is None:
            missing[unit] = parts.missing.get(i, "that layer has no attention whose heads are seen")
            continue
        try:
            if i not in readers:
                readers[i] = value_reader(model, i, trace[f"L{i}.resid_pre"][0], trace[f"L{i}.attn.v"][0])
        except UnsupportedError as error:
            missing[unit] = error.found
            continue
        plan, group = model.layers[i], groups[i]
        heads = range(plan.attention.heads) if unit.number < 0 else [unit.number]
        channels = range(group.channels)
        index = torch.tensor([value_row(plan, h, c) for h in heads for c in channels], device=group.rows.device)
        rows = torch.cat([group.rows[h * group.channels : (h + 1) * group.channels].float() for h in heads])
        pattern = trace[f"L{i}.attn.pattern@-1"][0, :, 0].float()
        found[unit] = Transport(unit, readers[i], index, group, rows, pattern)
    return found, missing, parts
