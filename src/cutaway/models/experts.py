"""Experts' insides.

Neurons are seen by running transformers' own experts function on a stand-in that hands every attribute of the module
through and lets us see, and change, what its gate gives.
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


def shows(native: Any) -> bool:
    """Whether an experts function applies the gate to all tokens at once, so that it shows the neurons itself."""
    from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

    return native in (batched_mm_experts_forward, grouped_mm_experts_forward)


def run_experts(
    native: Any,
    module: nn.Module,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    change: Callable[[Tensor], Tensor],
) -> Tensor:
    """[token, d_model] the experts' output, with neurons [token, k, d_expert] passed through ``change``.

    By ``native`` itself where it ``shows`` them; otherwise by the batched function, equal to it up to rounding.
    """
    from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

    def seen(acts: Tensor) -> Tensor:
        return change(acts.view(-1, top_k_index.shape[-1], acts.shape[-1])).reshape(acts.shape)

    if native is not grouped_mm_experts_forward:
        return batched_mm_experts_forward(_StandIn(module, seen), hidden, top_k_index, top_k_weights)
    by_expert = torch.sort(top_k_index.reshape(-1)).indices  # the order in which it takes tokens
    by_token = torch.argsort(by_expert)
    return grouped_mm_experts_forward(
        _StandIn(module, lambda acts: seen(acts[by_token])[by_expert]), hidden, top_k_index, top_k_weights
    )


def routed_by(gate: Tensor, top_k_index: Tensor) -> Tensor | None:
    """[token, expert] where a changed ``gate`` [token, expert] routes tokens; None where to no other experts."""
    before = torch.zeros_like(gate, dtype=torch.bool).scatter(1, top_k_index, True)
    routed = before | (gate != 0)
    return None if torch.equal(routed, before) else routed


def widened(routed: Tensor) -> Tensor:
    """[token, k] the experts of each token, filled up with others to as many as the widest token has."""
    most = int(routed.sum(1).max())
    return routed.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]


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
