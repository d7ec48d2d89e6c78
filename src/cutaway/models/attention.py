"""Attention's insides.

Scores and patterns come from running the module's *own* eager function under ``SoftmaxProbe``: whatever it does (soft
caps, sinks, position biases) is then right by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cutaway.core.errors import UnsupportedError


def additive_mask(module: nn.Module, mask: Any, q: Tensor, k: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The mask that an eager attention function adds to its scores, from whatever the native one was given.

    None, [batch or 1, heads or 1, query, key] booleans (True attends) and additive masks are understood.
    Raises UnsupportedError for others (block masks of flex attention, padding masks of flash attention).
    """
    n_query, n_key = q.shape[-2], k.shape[-2]
    low = torch.finfo(q.dtype).min
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if not causal or n_query == 1:
            return None
        later = torch.ones(n_query, n_key, dtype=torch.bool, device=q.device).triu(1)
        return torch.zeros(1, 1, n_query, n_key, dtype=q.dtype, device=q.device).masked_fill(later, low)
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        kind = f"{list(mask.shape)} tensor" if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"scores or patterns of {type(module).__name__}",
            f"its attention got a mask that is a {kind}",
            "load the model with attn_implementation='sdpa' or 'eager'",
        )
    mask = mask[..., :n_key]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, low)
    return mask


Change = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    """``x``: the change that is none."""
    return x


class SoftmaxProbe(TorchFunctionMode):
    """See, and change, the scores and the pattern of the attention that runs inside.

    The scores are what the first softmax over keys receives; the pattern is what then multiplies the values
    (after sinks are dropped and dtypes are restored). Attributes ``scores`` and ``pattern`` hold the last seen.
    """

    products = ("matmul", "bmm", "einsum", "__matmul__")

    def __init__(self, n_key: int, on_scores: Change = same, on_pattern: Change = same) -> None:
        super().__init__()
        self._n_key, self._on_scores, self._on_pattern = n_key, on_scores, on_pattern
        self.scores: Tensor | None = None
        self.pattern: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "softmax" and self.scores is None:
            x = args[0] if args else kwargs.pop("input")
            sinks = x[..., self._n_key :]
            scores = x[..., : self._n_key] if sinks.shape[-1] else x
            self.scores = self._on_scores(scores)
            # What was seen is what goes on, so that gradients flow through it.
            x = torch.cat([self.scores, sinks], dim=-1) if sinks.shape[-1] else self.scores
            return func(x, *args[1:], **kwargs)
        if name in self.products and self.scores is not None and self.pattern is None:
            at = 1 if name == "einsum" else 0
            self.pattern = self._on_pattern(args[at])
            return func(*args[:at], self.pattern, *args[at + 1 :], **kwargs)
        return func(*args, **kwargs)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """[batch, head, query, d_value] what torch's scaled_dot_product_attention gives, spelled out."""
    groups = query.shape[1] // key.shape[1] if enable_gqa else 1
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    pattern = torch.nn.functional.dropout(torch.softmax(scores, dim=-1), dropout_p)
    return torch.matmul(pattern, value)
