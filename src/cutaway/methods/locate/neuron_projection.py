"""Neuron projection: what heads and neurons write, read as tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from cutaway.core.errors import ParameterError, UnsupportedError
from cutaway.core.method import method
from cutaway.core.params import Count, Image, Prompt, Sites, Target
from cutaway.core.proof import Check
from cutaway.models.handle import Model
from cutaway.ops.origin import components, other_prompt
from cutaway.ops.parts import Group, Level, Parts, take_apart, unpadded
from cutaway.ops.readout import FrozenReadout, Head
from cutaway.ops.topk import BLOCK
from cutaway.ops.units import Unit
from cutaway.ops.watched import rounding
from cutaway.results.ranking import Ranking
from cutaway.results.table import Table


@method(cites=("geva2022promoting", "yu2024neuron"), example={"prompt": "#5 #9 #6 #7", "sites": "L1.mlp.act[0-3]"})
def neuron_projection(
    model: Model,
    prompt: Prompt,
    ranking: Ranking | None = None,
    sites: Sites | None = None,
    image: Image | None = None,
    target: Target | None = None,
    k: Count = 5,
    most: Count = 30,
) -> Table:
    """The tokens that heads and neurons raise and lower at the last position, by what they write there.

    A component's vector goes through the frozen final norm and the head. The vector is what was written in this run,
    its coefficient included: with a negative one a neuron raises the tokens at the bottom of its column's list.

    Source: Geva et al. (2022), "Transformer feed-forward layers build predictions by promoting concepts in the
    vocabulary space"; Yu and Ananiadou (2024), "Neuron-level knowledge attribution in large language models".

    Args:
        prompt: text or token ids.
        ranking: a ranking of heads or neurons, as the locating methods make.
        sites: heads (attn.z) or neurons (mlp.act, expert.act), instead of a ranking.
        image: an image that goes with the prompt.
        target: a token whose own change and place are given too; the model's answer when it is not given.
        k: how many tokens are listed on each side.
        most: how many components are read, from the first on.

    Returns:
        one row per component: its coefficient, the tokens raised and lowered most with the change of their logit, and
        the target's change and place (0 = raised most).

    Raises:
        ParameterError: neither or both of ranking and sites, or components of several levels at once.
        UnsupportedError: the layer's parts or the readout are not understood.
    """
    if (ranking is None) == (sites is None):
        found = "neither is given" if ranking is None else "both are given"
        raise ParameterError("parameters 'ranking' and 'sites'", found, "give one of them")
    batch = unpadded(model.inputs(prompt, image))
    left_out: list[str] = []
    if ranking is not None:
        units, left_out = components(model, ranking.items[:most], batch)
    else:
        found_units = (u for site in model.expand(sites or (), batch) for u in Unit.of_site(site, model.anatomy(batch)))
        units = list(found_units)[:most]
    parts = take_apart(model, batch, 1, _level(units))
    readout = Head(model).frozen(parts.final, parts.logits)
    vectors, coefficients = _vectors(parts, units)
    token = int(parts.logits[0].argmax()) if target is None else target
    rows = [_read(model, readout, part, token, k) for part in vectors.split(BLOCK)]
    return Table(
        title=f"what components of {model.name} write",
        columns={
            "component": [str(unit) for unit in units],
            "coefficient": coefficients,
            "raises": [text for row in rows for text in row[0]],
            "lowers": [text for row in rows for text in row[1]],
            "target change": torch.cat([row[2] for row in rows]),
            "target place": torch.cat([row[3] for row in rows]),
        },
        units={"target change": "logits"},
        check=Check(
            name="vectors and biases sum to the last residual stream",
            value=max(parts.identity_error, *(group.writer.error for group in parts.groups)),
            tolerance=rounding(model.dtype),
        ),
        notes=(
            f"target: {model.decode(token)!r}; changes are of logits, at the scale of this prompt's last state",
            *left_out,
            *other_prompt(model, prompt, batch, ranking),
        ),
    )


def _level(units: list[Unit]) -> Level:
    """The one level that all components are of."""
    levels: set[Level] = set()
    for unit in units:
        if unit.kind in ("mlp.act", "expert.act"):
            levels.add("neuron")
        elif unit.kind == "attn.z":
            by_source: Level = "attention-neuron" if unit.inner >= 0 else "head-position"
            levels.add(by_source if unit.source >= 0 else "head")
    if len(levels) != 1 or any(unit.kind not in ("mlp.act", "expert.act", "attn.z") for unit in units):
        found = f"they are {', '.join(sorted(levels)) or 'whole sublayers'}"
        raise ParameterError("components to read", found, "give heads, or neurons, in one call")
    if any(unit.kind == "attn.z" and unit.inner >= 0 and unit.source < 0 for unit in units):
        raise ParameterError("components to read", "a channel without its source", "write 'L3.attn.z[5/17] from 2'")
    return levels.pop()


def _vectors(parts: Parts, units: list[Unit]) -> tuple[Tensor, list[float]]:
    """([unit, 1, d] what each wrote, the coefficients); an expert that was not routed to wrote nothing."""
    groups: dict[tuple[int, str, int], Group] = {(g.layer, g.kind, g.expert): g for g in parts.groups}
    vectors, coefficients = [], []
    for unit in units:
        if unit.layer in parts.missing:
            raise UnsupportedError(f"component '{unit}'", parts.missing[unit.layer], "read another layer")
        expert = unit.number if unit.kind == "expert.act" else -1
        group = groups.get((unit.layer, unit.kind, expert))
        if group is None:
            vectors.append(torch.zeros_like(parts.final)[None])
            coefficients.append(0.0)
            continue
        element = group.element(unit)
        vectors.append(group.vectors(torch.tensor([element], device=parts.final.device)))
        coefficients.append(group.coefficient(element))
    return torch.cat(vectors), coefficients


def _read(
    model: Model, readout: FrozenReadout, vectors: Tensor, token: int, k: int
) -> tuple[list[str], list[str], Tensor, Tensor]:
    """Tokens raised and lowered with their changes, and the target's change and place, of some components."""
    slope = readout.head.slope_and_cap
    change = readout.project(vectors)[:, 0] * (slope[0] if slope is not None else 1.0)

    def listed(largest: bool) -> list[str]:
        best = change.topk(min(k, change.shape[-1]), largest=largest)
        return [
            ", ".join(f"{model.decode(int(i)).strip()} {v:+.2g}" for i, v in zip(ids, values, strict=True))
            for ids, values in zip(best.indices, best.values, strict=True)
        ]

    own = change[:, token]
    return listed(True), listed(False), own.cpu(), (change > own[:, None]).sum(-1).cpu()
