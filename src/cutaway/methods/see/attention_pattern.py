"""Attention patterns: where each head looks."""

from __future__ import annotations

from typing import Literal

import torch

from cutaway.core.errors import ParameterError, SiteMissingError, UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.method import method
from cutaway.core.params import Image, Prompt, TowerLayers
from cutaway.core.proof import Check
from cutaway.core.site import Items, Site
from cutaway.models.handle import Model
from cutaway.results.pattern import Pattern

ELSEWHERE = 0.05  # of the largest output: by so much rounding does not move it


@method(cites="vaswani2017attention", example={"prompt": "#5 #9 #6 #7 #8"})
def attention_pattern(
    model: Model,
    prompt: Prompt,
    image: Image | None = None,
    layers: TowerLayers | None = None,
    heads: list[int] | None = None,
    tower: Literal["text", "vision"] = "text",
) -> Pattern:
    """How much each position attends to every other, per layer and head.

    Patterns are what multiplies the values, so soft caps, sliding windows and sinks are in them; with a sink a row sums
    to less than 1. Layers without attention are left out. The check is ``pattern @ v`` against what the model computed.

    Source: Vaswani et al. (2017), "Attention is all you need", section 3.2.

    Args:
        prompt: text or token ids.
        image: an image that goes with the prompt.
        layers: the layers to read; all that attend when it is not given. Layers of the vision tower for tower=vision.
        heads: the heads to read; all when none are given.
        tower: the language model, or the vision tower.

    Returns:
        probabilities [layer, head, query, key].

    Raises:
        UnsupportedError: attention that gives something else than pattern times values.
        SiteMissingError: no vision tower, or a layer without attention. SiteRangeError: layer or head out of range.
    """
    inputs = model.inputs(prompt, image)
    scope = "vision" if tower == "vision" else ""
    stack = model.anatomy(inputs).layers(scope, f"{scope or 'text'} layers")
    if layers is None:
        chosen = [i for i, layer in enumerate(stack) if layer.has("attn.pattern")]
    else:
        every = layers == "*"
        chosen = list(range(len(stack))) if every else layers.resolve(len(stack), "layer", f"layers '{layers}'")
    if not chosen:
        why = stack[0].refused["attn.pattern"]
        raise SiteMissingError(f"site 'L*.attn.pattern' of {model.name}", why, "this model has no patterns to show")
    index = Items.of(heads) if heads else None
    patterns = [Site("attn.pattern", Items.of(i), index, scope=scope) for i in chosen]
    values = [Site(f"attn.{k}", Items.of(i), scope=scope) for i in chosen for k in ("v", "z")]
    trace = model.trace(inputs, want=[*patterns, *values], device=model.device)
    shapes = {site.layer: list(trace[site].shape[1:]) for site in patterns}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise ParameterError(f"layers {chosen}", f"their patterns are [head, query, key] {shapes}", "name layers alike")
    queries, keys = (_names(inputs, scope, n) for n in trace[patterns[0]].shape[-2:])
    kept = heads or list(range(trace[patterns[0]].shape[1]))
    worst = 0.0
    for site, i in zip(patterns, chosen, strict=True):
        v, z = trace[f"{scope + '/' if scope else ''}L{i}.attn.v"], trace[f"{scope + '/' if scope else ''}L{i}.attn.z"]
        groups = z.shape[2] // v.shape[2]
        for n, head in enumerate(kept):
            made = trace[site][0, n].float() @ v[0, :, head // groups].float()
            worst = max(worst, float((made - z[0, :, head].float()).abs().max()))
    if worst > ELSEWHERE * max(float(x.abs().max()) for site, x in trace.items() if site.kind == "attn.z"):
        found = "what attention gives is not its pattern times the values: it is scaled afterwards, as by a sink"
        raise UnsupportedError(f"attention patterns of {model.name}", found, "read 'L*.attn.pattern' as it is")
    return Pattern(
        title=f"attention of {model.name}",
        pattern=torch.stack([trace[site][0].float() for site in patterns]),
        labels={"layer": tuple(chosen), "head": tuple(kept), "query": queries, "key": keys},
        check=Check(name="pattern @ v is what attention gave", value=worst, tolerance=1e-4),
    )


def _names(inputs: Inputs, scope: str, n: int) -> tuple[str, ...]:
    """The prompt's tokens; numbers where attention is over something else, such as an encoder's states."""
    tokens = inputs.tokens[0]
    return tokens if not scope and n == len(tokens) else tuple(str(i) for i in range(n))
