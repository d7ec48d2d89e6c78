"""What use of a model could leave behind: its weights, hooks, modes, settings and transformers' registries."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


@dataclass(frozen=True)
class Traces:
    """The state of a module and of what lies around it."""

    weights: dict[str, Tensor]
    requires_grad: dict[str, bool]
    grads: set[str]
    hooks: dict[str, Any]
    training: dict[str, bool]
    config: dict[str, Any]
    attributes: dict[str, list[str]]
    registries: list[Any]
    modes: int

    @classmethod
    def of(cls, hf: nn.Module) -> Traces:
        """What there is now."""
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        named = dict(hf.named_modules())
        configs = {p: m.config for p, m in named.items() if hasattr(m, "config")}
        return cls(
            weights={n: w.detach().clone() for n, w in hf.state_dict().items()},
            requires_grad={n: p.requires_grad for n, p in hf.named_parameters()},
            grads={n for n, p in hf.named_parameters() if p.grad is not None},
            hooks={f"{p} {h}": list(getattr(m, h).values()) for p, m in named.items() for h in HOOKS},
            training={p: m.training for p, m in named.items()},
            config={p: (c._attn_implementation, copy.deepcopy(c.to_dict())) for p, c in configs.items()},
            attributes={p: sorted(vars(m)) for p, m in named.items()},
            registries=[(dict(vars(r)), dict(r.items())) for r in (ALL_ATTENTION_FUNCTIONS, ALL_EXPERTS_FUNCTIONS)],
            modes=torch._C._len_torch_function_stack(),
        )

    def differences(self, before: Traces) -> list[str]:
        """Names of what is not as it was."""
        found = [name for name, w in before.weights.items() if not torch.equal(self.weights[name], w)]
        for name in ("requires_grad", "grads", "hooks", "training", "config", "attributes", "registries", "modes"):
            now, then = getattr(self, name), getattr(before, name)
            if now != then and isinstance(then, dict):
                found += [f"{name} of {key!r}" for key in {*now, *then} if now.get(key) != then.get(key)]
            elif now != then:
                found.append(name)
        return found + sorted(self.weights.keys() ^ before.weights.keys())
