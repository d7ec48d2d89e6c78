"""The training loop of every specimen: seeded by step, so a run that was killed goes on as if it had not been."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batches = Callable[[int], "Batch"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Model inputs with the weight of each token as a target.

    Attributes:
        inputs: keyword arguments of the model; ``input_ids`` is (row, position).
        weights: (row, position); the loss of predicting token p is multiplied by ``weights[:, p]``. Position 0 is
            never a target.
    """

    inputs: Mapping[str, Tensor]
    weights: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Steps, learning rate and regularisation of one run: linear warm-up, then a cosine down to ``floor``."""

    steps: int
    rate: float
    warmup: int = 100
    floor: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    decay: float = 0.1
    clip: float = 1.0

    def rate_at(self, step: int) -> float:
        """Learning rate of step ``step`` (from 0)."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2)


def optimizer_for(model: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone (norm gains, biases and frozen weights have none)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": schedule.decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.rate, betas=schedule.betas)


def weighted_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats, weighted by target; logits (row, position, token)."""
    targets = weights[:, 1:].reshape(-1)
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].reshape(-1), reduction="none")
    return (losses * targets).sum() / targets.sum()


def train(
    model: nn.Module,
    batches: Batches,
    schedule: Schedule,
    *,
    start: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
) -> Iterator[tuple[int, float]]:
    """Trains in place and yields (steps done, loss in nats) after every step.

    The batch of a step depends on the step alone, so a run restarted at ``start`` with its optimizer repeats exactly
    what an unbroken one does. The model stays on the device it is on.
    """
    device = next(model.parameters()).device
    optimizer = optimizer or optimizer_for(model, schedule)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(start, schedule.steps):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        batch = batches(step)
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        loss = weighted_loss(model(**inputs).logits, inputs["input_ids"], batch.weights.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, schedule.clip)
        optimizer.step()
        model.eval()
        yield step + 1, loss.item()


def initialise(model: nn.Module, seed: int, *, weights: float, embeddings: float, outputs: float = 1.0) -> None:
    """Draws all matrices anew: N(0, weights), embeddings N(0, embeddings), projections to the stream x ``outputs``.

    Larger embeddings than the library's default let matching heads (induction, labels) form in hundreds of steps.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        std = embeddings if "embed_tokens" in name else weights
        std *= outputs if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def parameters(model: nn.Module) -> int:
    """How many numbers the model has; tied ones once."""
    return sum(p.numel() for p in model.parameters())


def curve(log: list[tuple[int, float]], points: int = 40) -> list[tuple[int, float]]:
    """At most ``points`` of a loss log, each the mean of the steps since the one before."""
    size = max(1, math.ceil(len(log) / points))
    chunks = [log[i : i + size] for i in range(0, len(log), size)]
    return [(chunk[-1][0], round(sum(loss for _, loss in chunk) / len(chunk), 4)) for chunk in chunks]
