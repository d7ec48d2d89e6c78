"""Attention of many runs over keys that they share, without a copy of those keys per run."""

from __future__ import annotations

import torch
from torch import Tensor

from cutaway.engine.base import Attended

FEWEST_KEYS, KEYS_PER_QUERY = 32, 4
"""Sharing beats a copy of the keys per run from so many shared keys on, in all and for each query of a run.

Measured on a CPU: with as many queries as shared keys the fused function on copies is up to five times faster, with a
seventieth as many it is ten times slower.
"""
UNDERSTOOD = {"scaling", "dropout", "softcap", "sliding_window", "is_causal"}
"""Arguments of attention functions that this formula takes in; the mask holds the window and the causal order."""


def worth_sharing(first: int, queries: int) -> bool:
    """Whether sharing ``first`` keys is the faster way for runs of so many queries each."""
    return first >= max(FEWEST_KEYS, KEYS_PER_QUERY * queries)


def can_share(seen: Attended) -> bool:
    """Whether the formula here gives what the layer's own function gave in the base run."""
    others = {name for name, value in seen.kwargs.items() if value is not None and value is not False}
    if others - UNDERSTOOD or (seen.mask is not None and seen.mask.shape[1] != 1) or seen.k.shape[2] < 2:
        return False
    half = seen.k.shape[2] // 2
    at = torch.arange(half, seen.k.shape[2], device=seen.k.device)
    z = attend_shared(seen, seen.q[:, :, half:], seen.k[:, :, half:], seen.v[:, :, half:], half, at)
    exact = seen.z[:, half:]
    error, size = float((z - exact).abs().max()), float(exact.abs().max())
    return error <= max(1e-5, 4 * torch.finfo(z.dtype).eps) * size


def attend_shared(seen: Attended, q: Tensor, k: Tensor, v: Tensor, first: int, at: Tensor) -> Tensor:
    """[run, query, head, d_value] attention over the base run's keys before ``first`` and each run's own from there on.

    q: [run, head, query, d] at positions ``at``; k, v: [run, kv_head, key, d]. Queries of a group of heads, and of all
    runs, are rows of one product with the shared keys.
    """
    n, m = q.shape[0], q.shape[2]
    kv_heads, own = k.shape[1], k.shape[2]
    scale = seen.kwargs.get("scaling")
    q = q.unflatten(1, (kv_heads, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    rows = q.transpose(0, 1).flatten(1, 3)
    shared = (rows @ seen.k[0, :, :first].transpose(1, 2)).view(kv_heads, n, -1, m, first)
    later = (q.flatten(2, 3) @ k.transpose(2, 3)).view(n, kv_heads, -1, m, own)
    scores = torch.cat([shared, later.transpose(0, 1)], dim=-1)
    cap = seen.kwargs.get("softcap")
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if seen.mask is not None:
        scores += seen.mask[0, 0, at, : first + own]
    pattern = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    z = (pattern[..., :first].flatten(1, 3) @ seen.v[0, :, :first]).view(kv_heads, n, -1, m, v.shape[-1])
    z = z.transpose(0, 1) + (pattern[..., first:].transpose(0, 1).flatten(2, 3) @ v).view(
        n, kv_heads, -1, m, v.shape[-1]
    )
    return z.flatten(1, 2).transpose(1, 2)
