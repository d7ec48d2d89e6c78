"""Random weights under which every parameter matters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

NOISE = 0.1  # on vectors: norm weights, biases, gates


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generator at ``seed`` inside the block, as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def redraw(model: nn.Module, seed: int) -> None:
    """Draws all parameters anew from ``seed``; buffers stay.

    Matrices and larger: N(0, 1 / fan-in), which keeps activations and attention scores near unit scale. Vectors keep
    the value transformers gives them (1 or 0 for norms, 0 for biases and closed gates) plus N(0, 0.1), so that a bias
    that is dropped, or a norm weight that is taken for 1, shows in the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
        if parameter.dim() >= 2:
            parameter.copy_(noise / math.sqrt(_fan_in(parameter)))
        else:
            parameter.add_(noise * NOISE)


def _fan_in(parameter: torch.Tensor) -> int:
    # Stacked experts (experts, out, in) are matrices with a leading axis; convolutions (out, in, *kernel) sum over all
    return parameter.shape[-1] if parameter.dim() <= 3 else math.prod(parameter.shape[1:])
