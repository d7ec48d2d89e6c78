"""Activation patching: which activations carry the difference between two prompts."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from cutaway.core.errors import InputError, ParameterError, SiteMissingError
from cutaway.core.inputs import Inputs, require_same_length
from cutaway.core.intervention import Set
from cutaway.core.method import method
from cutaway.core.metric import Metric
from cutaway.core.params import Count, Image, Layers, MetricLike, Positions, Prompt
from cutaway.core.proof import Check
from cutaway.core.site import Items, Site
from cutaway.engine.replay import BUDGET, replay
from cutaway.models.handle import Model
from cutaway.results.grid import Grid

KindName = Literal[
    "resid_pre", "attn.q", "attn.k", "attn.v", "attn.z", "attn.out", "resid_mid", "mlp.act", "mlp.out", "resid_post"
]
HEADED = ("attn.q", "attn.k", "attn.v", "attn.z")


@method(
    cites="zhang2024patching",
    example={"clean": "#5 #9 #6 #7", "corrupt": "#5 #4 #6 #7", "metric": "logit_diff: #11, #22"},
)
def patch(
    model: Model,
    clean: Prompt,
    corrupt: Prompt,
    metric: MetricLike,
    kind: KindName = "resid_pre",
    by: Literal["position", "head", "neurons"] = "position",
    layers: Layers | None = None,
    positions: Positions = "all",
    blocks: Count = 16,
    direction: Literal["clean->corrupt", "corrupt->clean"] = "clean->corrupt",
    normalise: bool = True,
    clean_image: Image | None = None,
    corrupt_image: Image | None = None,
    budget: Count = BUDGET,
) -> Grid:
    """The metric after putting one activation of one run into the other, for every layer and position, head or block.

    With ``clean->corrupt`` the corrupt prompt runs and receives clean activations: what restores the answer? With
    ``corrupt->clean`` the clean prompt runs and is damaged. Normalised, 0 is the run that receives and 1 the run that
    gives. Runs are replayed: what an intervention cannot change is not computed again. The check recomputes the
    strongest cell in a whole forward pass.

    Source: Zhang and Nanda (2024), "Towards best practices of activation patching in language models".

    Args:
        clean: text or ids of the prompt whose answer is right.
        corrupt: text or ids of equal token length.
        metric: what is measured, e.g. ``logit_diff: #11, #22``.
        kind: the kind of site that is patched.
        by: one cell per position, per head (at all ``positions``) or per block of neurons (likewise).
        layers: the layers to patch; all that have the kind when it is not given.
        positions: the positions to patch.
        blocks: into how many blocks neurons are divided.
        direction: which run gives and which receives.
        normalise: divide by the difference of the two runs.
        clean_image: image of the clean prompt.
        corrupt_image: image of the corrupt prompt; the clean one when it is not given.
        budget: bytes that the replayed rows may take.

    Returns:
        normalised recovery, or the metric in its unit, [layer, position | head | block].

    Raises:
        MismatchError: prompts of different token length, naming the tokens. ParameterError: ``by`` does not fit the
        kind, or both runs give the same value. InputError: several prompts.
    """
    measure: Metric = metric
    images = (clean_image, corrupt_image if corrupt_image is not None else clean_image)
    runs = tuple(model.inputs(p, image) for p, image in zip((clean, corrupt), images, strict=True))
    if len(runs[0]) != 1 or len(runs[1]) != 1:
        raise InputError("patch", f"{len(runs[0])} and {len(runs[1])} prompts", "give one pair per call")
    require_same_length(*runs)
    prompt = runs[1] if direction == "clean->corrupt" else runs[0]
    giver, receiver = (measure.prepare(run) for run in (runs if direction == "clean->corrupt" else runs[::-1]))
    measure = _with_reference(model, measure, giver)
    cells, axis, labels = _cells(model, kind, by, layers, positions, blocks, prompt)
    source = model.trace(giver, want=[row[0].whole() for row in cells])
    flat = [cell for row in cells for cell in row]
    sweep = [Set(cell, _part(source[cell.whole()], cell, giver)) for cell in flat]
    found = replay(model, prompt, sweep, measure, budget=budget)
    values = found.values.float().cpu()
    base = float(found.base)
    given = float(measure(_logits(source.logits), giver)[0])
    strongest = int((values - base).abs().argmax())
    plain = model.trace(receiver, do=sweep[strongest]).logits
    error = abs(float(measure(_logits(plain), receiver)[0]) - float(values[strongest]))
    if normalise and abs(given - base) < 1e-6:
        raise ParameterError(
            f"metric '{measure}'", f"both runs give {base:.6g}", "choose prompts that differ in it, or normalise=False"
        )
    grid = (values - base) / (given - base) if normalise else values
    return Grid(
        title=f"{kind} patched {direction} in {model.name}",
        values=grid.reshape(len(cells), -1),
        axes=("layer", axis),
        measure="normalised recovery" if normalise else str(measure),
        unit="1 = the run that gives" if normalise else measure.unit,
        center=0.0 if normalise else base,
        labels={"layer": tuple(row[0].layer for row in cells), axis: labels},
        check=Check(
            name="the strongest cell, in a whole forward pass",
            value=error,
            tolerance=1e-4 * max(1.0, abs(given - base)),
        ),
        notes=(
            f"{measure}: {base:.6g} in the run that receives, {given:.6g} in the run that gives ({measure.unit})",
            f"how: {found.how}",
        ),
    )


def _logits(logits: Tensor | None) -> Tensor:
    if logits is None:
        raise SiteMissingError("logits", "the run stopped before them", "run it to the end")
    return logits


def _with_reference(model: Model, metric: Metric, giver: Inputs) -> Metric:
    """``kl`` without a reference compares with the run that gives."""
    if metric.form != "kl" or metric.reference is not None:
        return metric
    at = metric.reads(giver)
    return metric.against(model(giver)[torch.arange(len(giver))[:, None], torch.tensor(at)])


def _cells(
    model: Model, kind: str, by: str, layers: list[int] | None, positions: Items | str, blocks: int, inputs: Inputs
) -> tuple[list[list[Site]], str, tuple[str | int, ...]]:
    """Concrete sites [layer][cell], the name of the second axis and its labels."""
    anatomy = model.anatomy(inputs)
    have = [i for i, layer in enumerate(anatomy.stacks[""]) if layer.has(kind)]
    if not have or (layers is not None and any(i not in have for i in layers)):
        model.expand(Site(kind, None if layers is None else Items.of(layers)), inputs)
    chosen = have if layers is None else layers
    whole = [Site(kind, Items.of(i)) for i in chosen]
    real = inputs.real[0]
    places = [real.index(p) for p in inputs.select(positions, "positions")[0]]
    if by == "position":
        tokens = tuple(inputs.tokens[0][real[p]] for p in places)
        return [[site.at(positions=p) for p in places] for site in whole], "position", tokens
    where = None if positions == "all" else Items.of(places)
    needs = HEADED if by == "head" else ("mlp.act",)
    if kind not in needs:
        raise ParameterError(f"by={by!r} with kind={kind!r}", "that kind has none", f"choose kind {' or '.join(needs)}")
    sizes = {site.layer: anatomy.size(site) for site in whole}
    if len(set(sizes.values())) > 1:
        raise ParameterError(f"by={by!r} over layers {[*sizes]}", f"they have {[*sizes.values()]}", "name layers alike")
    size = next(iter(sizes.values()))
    if by == "head":
        return [[site.at(index=h, positions=where) for h in range(size)] for site in whole], "head", tuple(range(size))
    edges = [round(i * size / min(blocks, size)) for i in range(min(blocks, size) + 1)]
    spans = list(pairwise(edges))
    names = tuple(f"{a}-{b - 1}" for a, b in spans)
    return [[site.at(index=range(a, b), positions=where) for a, b in spans] for site in whole], "neurons", names


def _part(x: Tensor, cell: Site, inputs: Inputs) -> Tensor:
    """What ``cell`` names of the whole tensor [1, pos, ...] of its site."""
    if cell.positions is not None:
        x = x[:, inputs.select(cell.positions, f"site '{cell}'")[0]]
    if cell.index is not None:
        x = x.index_select(2, torch.tensor(cell.index.resolve(x.shape[2], "index", f"site '{cell}'"), device=x.device))
    return x
