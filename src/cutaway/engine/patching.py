"""What patching sweeps share: two prompts of one length, which run gives and which receives, and the cells patched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from cutaway.core.errors import InputError, MismatchError, ParameterError, SiteMissingError
from cutaway.core.inputs import Inputs, require_difference, require_same_length
from cutaway.core.intervention import Set
from cutaway.core.metric import Metric
from cutaway.core.site import Items, Site
from cutaway.models.handle import Model

Direction = Literal["clean->corrupt", "corrupt->clean"]
Kind = Literal[
    "resid_pre",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.z",
    "attn.out",
    "resid_mid",
    "mlp.act",
    "expert.gate",
    "expert.act",
    "mlp.out",
    "resid_post",
]
By = Literal["position", "head", "neurons", "expert"]
UNITS = {
    "head": ("attn.q", "attn.k", "attn.v", "attn.z"),
    "neurons": ("mlp.act", "expert.act"),
    "expert": ("expert.gate", "expert.act"),
}
"""The kinds whose tensors are divided so; every kind is divided by position."""


@dataclass(frozen=True)
class Exchange:
    """A run that gives activations and a run that receives them.

    Attributes:
        giver, receiver: inputs as they run (``metric.prepare``). prompt: the receiver's as they were given.
        metric: what is measured in the run that receives.
    """

    giver: Inputs
    receiver: Inputs
    prompt: Inputs
    metric: Metric

    @staticmethod
    def of(
        model: Model,
        clean: Any,
        corrupt: Any,
        metric: Metric | None,
        direction: Direction,
        images: tuple[Any, Any] = (None, None),
        number: int | None = None,
    ) -> Exchange:
        """The exchange between two prompts; without a metric, the logit difference of their two answers.

        Images are of the clean and of the corrupt prompt; the clean one serves both when it is alone. ``kl`` without
        a reference compares with the run that gives. Sentences name the pair by ``number``, where there are several.

        Raises:
            MismatchError: prompts of different token length, naming the tokens. InputError: several prompts.
            ParameterError: no metric, and both prompts have one answer.
        """
        pictures = (images[0], images[1] if images[1] is not None else images[0])
        runs = (model.inputs(clean, pictures[0]), model.inputs(corrupt, pictures[1]))
        if len(runs[0]) != 1 or len(runs[1]) != 1:
            raise InputError("an exchange", f"{len(runs[0])} and {len(runs[1])} prompts", "give one of each")
        require_same_length(*runs, number or 0)
        require_difference(*runs, number or 0)
        chosen = answers_apart(model, *runs, number) if metric is None else metric
        prompt = runs[1] if direction == "clean->corrupt" else runs[0]
        giver, receiver = (chosen.prepare(run) for run in (runs if direction == "clean->corrupt" else runs[::-1]))
        if chosen.form == "kl" and chosen.reference is None:
            chosen = chosen.against(model(giver)[torch.arange(len(giver))[:, None], torch.tensor(chosen.reads(giver))])
        return Exchange(giver, receiver, prompt, chosen)

    def scored(self, logits: Tensor | None, inputs: Inputs) -> float:
        """The metric of whole logits of one of the runs."""
        if logits is None:
            raise SiteMissingError("logits", "the run stopped before them", "run it to the end")
        return float(self.metric(logits, inputs)[0])


def answers_apart(model: Model, clean: Inputs, corrupt: Inputs, number: int | None = None) -> Metric:
    """The logit difference of the two prompts' own answers."""
    model.anatomy()  # weights that are no numbers have no answers
    first, second = (int(model(run)[0, run.last[0]].argmax()) for run in (clean, corrupt))
    if first == second:
        which = "" if number is None else f" of pair {number}"
        found = f"both prompts{which} are answered with {model.decode(first)!r}"
        raise ParameterError("metric", found, "name one, as 'logit_diff: A, B', or choose prompts that differ in it")
    return Metric("logit_diff", (first, second), words=(model.decode(first), model.decode(second)))


@dataclass(frozen=True)
class Cells:
    """The cells of a sweep.

    Attributes:
        rows: concrete sites [layer][cell]. axis: name of the second axis. labels: of its cells.
        places: padded positions that cells cover; one each where the axis is "position".
        widths: heads, experts or neurons per cell; empty where the axis is "position".
    """

    rows: list[list[Site]]
    axis: str
    labels: tuple[str | int, ...]
    places: tuple[int, ...]
    widths: tuple[int, ...] = ()

    @property
    def flat(self) -> list[Site]:
        """All cells, layer by layer."""
        return [cell for row in self.rows for cell in row]

    @property
    def sites(self) -> list[Site]:
        """The whole tensors that they are part of, one per layer."""
        return [row[0].whole() for row in self.rows]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of the rows."""
        return tuple(row[0].layer for row in self.rows)

    @staticmethod
    def of(
        model: Model,
        kind: str,
        by: str,
        layers: Sequence[int] | None,
        positions: Items | str,
        blocks: int,
        inputs: Inputs,
    ) -> Cells:
        """One cell per position, or per head, expert or block of neurons (at all ``positions``), in every layer.

        A block of experts' neurons lies inside one expert, so that there is at least one of each.

        Raises:
            ParameterError: ``by`` does not fit the kind, or layers differ in size. SiteError: what is not there.
        """
        anatomy = model.anatomy(inputs)
        have = [i for i, layer in enumerate(anatomy.stacks[""]) if layer.has(kind)]
        if not have or (layers is not None and any(i not in have for i in layers)):
            model.expand(Site(kind, None if layers is None else Items.of(layers)), inputs)
        whole = [Site(kind, Items.of(i)) for i in (have if layers is None else layers)]
        real = inputs.real[0]
        padded = tuple(inputs.select(positions, "positions")[0])
        places = [real.index(p) for p in padded]
        if by == "position":
            tokens = tuple(inputs.tokens[0][p] for p in padded)
            return Cells([[site.at(positions=p) for p in places] for site in whole], "position", tokens, padded)
        where = None if positions == "all" else Items.of(places)
        if kind not in UNITS[by]:
            found, hint = "that kind has none", f"choose kind {' or '.join(UNITS[by])}"
            raise ParameterError(f"by={by!r} with kind={kind!r}", found, hint)
        inside = {site.layer: anatomy.stacks[""][site.layer].d_expert for site in whole if kind == "expert.act"}
        sizes = {site.layer: (anatomy.size(site), inside.get(site.layer, 0)) for site in whole}
        if len(set(sizes.values())) > 1:
            found = f"they have {[f'{n} of {d} neurons' if inside else n for n, d in sizes.values()]}"
            raise ParameterError(f"by={by!r} over layers {[*sizes]}", found, "name layers alike")
        divided = [_units(site.at(positions=where), by, *sizes[site.layer], blocks) for site in whole]
        labels, _, widths = zip(*divided[0], strict=True)
        return Cells([[cell for _, cell, _ in units] for units in divided], by, labels, padded, widths)

    @staticmethod
    def over(
        model: Model,
        kind: str,
        by: str,
        layers: Sequence[int] | None,
        positions: Items | str,
        blocks: int,
        prompts: Sequence[Inputs],
    ) -> list[Cells]:
        """The cells of each of several prompts, as many in each and with the same labels.

        A position is labelled with its token where all prompts have the same one there, else with its number: counted
        from the start where that is the same in all, from the end (-1 is the last) where it is not.

        Raises:
            MismatchError: prompts whose cells cannot be laid over each other.
        """
        found = [Cells.of(model, kind, by, layers, positions, blocks, each) for each in prompts]
        if by != "position" or len(found) == 1:
            return found
        counts = [len(cells.labels) for cells in found]
        if len(set(counts)) > 1:
            b = next(i for i, n in enumerate(counts) if n != counts[0])
            raise MismatchError(
                f"cells by position, with positions '{positions}'",
                f"prompt 0 has {counts[0]} of them and prompt {b} has {counts[b]}",
                "name as many in all: '-3--1' counts from the end, '0-2' from the start",
            )
        labels = _labels(prompts, [cells.places for cells in found])
        return [replace(cells, labels=labels) for cells in found]

    def sums(self, terms: Mapping[Site, Tensor]) -> Tensor:
        """[layer, cell] the sum over each cell of terms {whole site: [1, pos, ...]}, in float64."""
        at = torch.tensor(self.places)
        found = []
        for site in self.sites:
            x = terms[site][0, at.to(terms[site].device)].double()
            if not self.widths:
                found.append(x.flatten(1).sum(1))
                continue
            units = x.sum(0)
            by_unit = units.flatten() if self.axis == "neurons" else units.reshape(len(units), -1).sum(1)
            whole = len(self.widths) == len(by_unit)
            found.append(by_unit if whole else torch.stack([part.sum() for part in by_unit.split(list(self.widths))]))
        return torch.stack(found).cpu()

    def patches(self, source: Mapping[Site, Tensor], giver: Inputs, cells: Sequence[Site] | None = None) -> list[Set]:
        """Every cell (or those given) set to what the giving run has there."""
        return [Set(cell, part(source[cell.whole()], cell, giver)) for cell in (self.flat if cells is None else cells)]


def _labels(prompts: Sequence[Inputs], places: Sequence[Sequence[int]]) -> tuple[str | int, ...]:
    """One label per place that holds for all prompts."""
    each = list(zip(prompts, [prompt.real[0] for prompt in prompts], places, strict=True))
    tokens = [[prompt.tokens[0][p] for p in at] for prompt, _, at in each]
    starts = [[real.index(p) for p in at] for _, real, at in each]
    ends = [[real.index(p) - len(real) for p in at] for _, real, at in each]
    found: list[str | int] = []
    for i in range(len(places[0])):
        agreed = ({row[i] for row in rows} for rows in (tokens, starts, ends))
        found += next((one for one in agreed if len(one) == 1), {i})
    return tuple(found)


def part(x: Tensor, cell: Site, inputs: Inputs) -> Tensor:
    """What ``cell`` names of the whole tensor [1, pos, ...] of its site."""
    if cell.positions is not None:
        x = x[:, inputs.select(cell.positions, f"site '{cell}'")[0]]
    if cell.index is not None:
        x = x.index_select(2, torch.tensor(cell.index.resolve(x.shape[2], "index", f"site '{cell}'"), device=x.device))
    if cell.inner is not None:
        x = x.index_select(3, torch.tensor(cell.inner.resolve(x.shape[3], "neuron", f"site '{cell}'"), device=x.device))
    return x


def _units(site: Site, by: str, size: int, inside: int, blocks: int) -> list[tuple[str | int, Site, int]]:
    """(label, cell, width) of ``size`` heads, experts or neurons, or blocks of them; an expert has ``inside``."""
    if by != "neurons":
        return [(i, site.at(index=i), 1) for i in range(size)]
    if not inside:
        return [(f"{a}-{b - 1}", site.at(index=range(a, b)), b - a) for a, b in _spans(size, blocks)]
    spans = _spans(inside, max(1, blocks // size))
    return [(f"{e}/{a}-{b - 1}", site.at(index=e, inner=range(a, b)), b - a) for e in range(size) for a, b in spans]


def _spans(size: int, blocks: int) -> list[tuple[int, int]]:
    """(first, one past the last) of so many blocks of ``size`` items, as even as can be."""
    n = min(blocks, size)
    return list(pairwise(round(i * size / n) for i in range(n + 1)))
