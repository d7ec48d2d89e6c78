"""Logit lens: what each layer would say if the model stopped there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cutaway.core.errors import SiteMissingError
from cutaway.core.method import method
from cutaway.core.params import Count, Image, Layers, Positions, Prompt, Target
from cutaway.core.proof import Check
from cutaway.models.handle import Model
from cutaway.results.readout import Readout

ROWS = 64  # states whose logits are held at a time
EMBEDDING = "embed"
"""Label of the row in front of the first layer."""


@method(cites="nostalgebraist2020logitlens", example={"prompt": "#5 #9 #6 #7 #8", "k": 3})
def logit_lens(
    model: Model,
    prompt: Prompt,
    image: Image | None = None,
    target: Target | None = None,
    k: Count = 5,
    layers: Layers = "*",
    positions: Positions = "all",
) -> Readout:
    """The tokens that each layer and position would say, through the model's own final norm and head.

    Row ``embed`` is the stream that enters layer 0, row ``l`` the stream that leaves layer l. Each state is normed by
    itself, so the last row is the model's own output; the check measures that. Image positions are read like any other.

    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).

    Args:
        prompt: text or token ids.
        image: an image that goes with the prompt.
        target: a token whose log-probability and rank are given at every layer and position.
        k: how many tokens to keep per layer and position.
        layers: the layers to read.
        positions: the positions to read.

    Returns:
        tokens, ids and log-probabilities in nats, [layer, position, k].

    Raises:
        UnsupportedError: the model's way from the residual stream to the logits could not be told.
    """
    inputs = model.inputs(prompt, image)
    places = inputs.select(positions, "positions")[0]
    wanted = [f"L{layer}.resid_post" for layer in layers]
    entry = ["L0.resid_pre"] if model.layers[0].has("resid_pre") else []
    lacking = next((layer for layer in layers if not model.layers[layer].has("resid_post")), None)
    if lacking is not None:
        why = model.layers[lacking].refused["resid_post"]
        raise SiteMissingError(f"site 'L{lacking}.resid_post' of {model.name}", why, "leave that layer out")
    last = f"L{model.n_layers - 1}.resid_post"
    trace = model.trace(inputs, want=[*entry, *wanted, *([] if last in wanted else [last])], device=model.device)
    names = (*entry, *wanted)
    at_once = max(1, ROWS // max(1, len(places)))  # layers that go through the head together
    rows = [
        row
        for i in range(0, len(names), at_once)
        for row in _read(model, torch.stack([trace[site][0, places] for site in names[i : i + at_once]]), k, target)
    ]
    ids = torch.stack([row[0] for row in rows])
    error = _last_row_error(model, trace[last][0, places], trace.logits, places)
    return Readout(
        title=f"logit lens of {model.name}",
        tokens=[[[model.decode(int(i)) for i in cell] for cell in row] for row in ids],
        ids=ids,
        log_probs=torch.stack([row[1] for row in rows]),
        target=model.decode(target) if target is not None else "",
        target_log_prob=torch.stack([row[2] for row in rows]) if target is not None else None,
        target_rank=torch.stack([row[3] for row in rows]) if target is not None else None,
        labels={
            "layer": (*([EMBEDDING] if entry else []), *layers),
            "position": tuple(inputs.tokens[0][p] for p in places),
        },
        check=Check(name="the last layer's readout is the model's output", value=error, tolerance=1e-4),
    )


def _read(model: Model, states: Tensor, k: int, target: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each layer of states [layer, position, d]: top ids and log-probabilities [position, k], and the target's
    log-probability and rank [position]."""
    logp = model.readout(states)
    best, ids = logp.topk(min(k, logp.shape[-1]), dim=-1)
    own = logp[..., target if target is not None else 0]
    yield from zip(ids, best, own, (logp > own[..., None]).sum(dim=-1), strict=True)


def _last_row_error(model: Model, states: Tensor, logits: Tensor | None, places: list[int]) -> float:
    if logits is None:
        return float("nan")
    return float((model.readout(states) - logits[0, places].float().log_softmax(dim=-1)).abs().max())
