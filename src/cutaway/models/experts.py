"""Experts' insides.

Neurons are seen by running transformers' own batched experts function on a stand-in that hands every attribute of the
module through and lets us see, and change, what its gate gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _StandIn:
    """An experts module whose neurons pass through ``seen`` on their way to the output matrix."""

    def __init__(self, module: nn.Module, seen: Callable[[Tensor], Tensor]) -> None:
        self.__dict__["_module"], self.__dict__["_seen"] = module, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _apply_gate(self, x: Tensor) -> Tensor:
        return self._seen(self._module._apply_gate(x))

    def act_fn(self, x: Tensor) -> Tensor:
        """Experts without a gate: the activation function is the last step before the output matrix."""
        return self._seen(self._module.act_fn(x))


def run_experts(
    module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """[token, d_model] the experts' output, with neurons [token, k, d_expert] passed through ``change``."""
    from transformers.integrations.moe import batched_mm_experts_forward

    k = top_k_index.shape[-1]
    stand_in = _StandIn(module, lambda acts: change(acts.view(-1, k, acts.shape[-1])).reshape(acts.shape))
    return batched_mm_experts_forward(stand_in, hidden, top_k_index, top_k_weights)


def scatter_gate(top_k_index: Tensor, top_k_weights: Tensor, n_experts: int) -> Tensor:
    """[token, expert] routing weights, 0 where a token is not routed."""
    gate = top_k_weights.new_zeros(top_k_index.shape[0], n_experts)
    return gate.scatter(1, top_k_index, top_k_weights)


def scatter_acts(top_k_index: Tensor, acts: Tensor, n_experts: int) -> Tensor:
    """[token, expert, d_expert] neurons, 0 where a token is not routed, from [token, k, d_expert]."""
    full = acts.new_zeros(acts.shape[0], n_experts, acts.shape[-1])
    return full.scatter(1, top_k_index[..., None].expand_as(acts), acts)


def gather_acts(top_k_index: Tensor, full: Tensor) -> Tensor:
    """[token, k, d_expert] back from [token, expert, d_expert]."""
    return full.gather(1, top_k_index[..., None].expand(-1, -1, full.shape[-1]))


def gather_gate(top_k_index: Tensor, gate: Tensor) -> Tensor:
    """[token, k] back from [token, expert]."""
    return torch.gather(gate, 1, top_k_index)
