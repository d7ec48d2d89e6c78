"""The check each model passes before anything is said of it: its logits do not change when it is watched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutaway.core.errors import UnsupportedError, WeightsError
from cutaway.core.inputs import Inputs

if TYPE_CHECKING:
    from cutaway.models.handle import Model


@contextmanager
def random_numbers_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """What runs inside draws from copies of the random states, so that a model in training is none the wiser."""
    # the CPU's state always is; torch can fork that of other devices but MPS
    numbered = [device for device in devices if device.type not in ("cpu", "mps")]
    with torch.random.fork_rng(numbered, device_type=numbered[0].type if numbered else "cuda"):
        yield


def spares_cache(model: Model, sample: Inputs) -> bool:
    """Whether ``use_cache=False`` passes through the model's other keywords, builds no cache and changes no logit."""
    given = sample.kwargs(model.device)
    with random_numbers_kept(model.devices), torch.no_grad():
        plain = model.hf(**given)
    if getattr(plain, "past_key_values", None) is None:
        return False
    try:
        with random_numbers_kept(model.devices), torch.no_grad():
            spared = model.hf(**given, use_cache=False)
    except (TypeError, ValueError):
        return False
    same = (spared.logits == plain.logits) | (spared.logits.isnan() & plain.logits.isnan())
    return getattr(spared, "past_key_values", None) is None and bool(same.all())


def check_watched(model: Model, sample: Inputs) -> None:
    """Raises when watching changes the logits (UnsupportedError), or they are not finite (WeightsError)."""
    with random_numbers_kept(model.devices):
        plain = model(sample)
    _finite(model, plain, sample)
    wants = []
    for scope, layers in model.anatomy().stacks.items():
        kinds = {k for layer in layers for k in (*layer.read, "attn.z", "attn.q") if layer.has(k)}
        if not scope or sample.extra:
            wants += [f"{scope}/L*.{k}" if scope else f"L*.{k}" for k in sorted(kinds)]
    with random_numbers_kept(model.devices):
        watched = model.trace(sample, want=wants).logits
    if watched is None or not bool(((watched == plain) | (watched.isnan() & plain.isnan())).all()):
        worst = float("nan") if watched is None else float((watched - plain).abs().max())
        name = type(model.hf).__name__
        raise UnsupportedError(
            f"watch {name}", f"its logits change by {worst:.3g} when watched", "run 'cutaway doctor'"
        )


def _finite(model: Model, logits: Tensor, sample: Inputs) -> None:
    lined_up = logits.shape[:2] == sample.mask.shape
    read = logits[sample.mask.bool().to(logits.device)] if lined_up else logits
    if bool(torch.isfinite(read).all()):
        return
    bad = next((n for n, p in model.hf.named_parameters() if not bool(torch.isfinite(p).all())), "")
    found = f"{bad} holds NaN or infinite values" if bad else "its logits are not finite although its weights are"
    raise WeightsError(f"model {model.name!r}", found, "load the weights again, or another dtype")
