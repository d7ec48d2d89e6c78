"""Gradients at the residual stream as one head's query, key or value reads it, or as an MLP does.

All heads of a layer read one normed state through one product. Their gradients are told apart by the columns of that
product's output that belong to each head, which are found by asking: a gradient at one head alone reaches some columns
and not others. Where a layer is not built so (two products in a row, columns shared, an unusual norm), each head's
gradient is taken by itself, which is the definition; the fast way is compared with it at first use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cutaway.core.errors import SiteMissingError
from cutaway.core.site import Site
from cutaway.models.handle import Model
from cutaway.models.plan import is_transposed

HEADED = ("attn.q", "attn.k", "attn.v")
NEAR = 1e-3
"""Relative difference from the definition beyond which the fast way is not taken (float32 rounding is far below)."""


@dataclass(frozen=True)
class Passed:
    """One call of a module in the forward pass: its input and output, with their graph."""

    module: nn.Module
    given: Tensor
    made: Tensor


@dataclass(frozen=True)
class Split:
    """How one layer's heads read: by which modules, and which output columns [head, column] are each head's."""

    linear: nn.Module
    norm: nn.Module | None
    columns: Tensor


_splits: WeakKeyDictionary[nn.Module, dict[tuple[int, str], Split | None]] = WeakKeyDictionary()


class Branches:
    """What one forward pass leaves behind for ``pull``."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._passed: dict[int, list[Passed]] = {}
        self._splits = _splits.setdefault(model.hf, {})

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, what the linear modules and norms of every layer pass on is kept."""
        with ExitStack() as exits:
            for i, layer in enumerate(self.model.layers):
                calls = self._passed[i] = []
                block = self.model.hf.get_submodule(layer.path)
                inside = self.model.hf.get_submodule(layer.attention.module).modules() if layer.attention else ()
                for module in {id(m): m for m in (*block.children(), *inside)}.values():
                    if not any(module.children()):
                        exits.callback(module.register_forward_hook(_keeper(calls), with_kwargs=True).remove)
            yield

    def pull(self, values: Mapping[Site, Tensor], site: Site, gradient: Tensor) -> Tensor:
        """[batch, pos, (head,) d_model] the gradient at the residual stream, of one at ``site``."""
        layer = self.model.layers[site.layer]
        kind = "resid_pre" if site.kind in HEADED or layer.parallel else "resid_mid"
        start = Site(kind, site.layers)
        if site.kind not in (*HEADED, "mlp.in", "mlp.out"):
            raise SiteMissingError(f"the branch before '{site}'", "there is none", f"name {', '.join(HEADED)}, mlp.in")
        missing = next((s for s in (site, start) if s not in values), None)
        if missing is not None:
            raise SiteMissingError(f"the gradient before '{site}'", f"'{missing}' was not wanted", "name both ends")
        if site.kind not in HEADED:
            return _vjp(values[site], values[start], gradient)
        key = site.layer, site.kind
        if key not in self._splits:
            self._splits[key] = self._split(values[site], values[start], site.layer)
        split = self._splits[key]
        if split is not None:
            fast = self._fast(split, values[site], values[start], gradient, site.layer)
            if fast is not None:
                return fast
        heads = range(gradient.shape[2])
        return torch.stack([_vjp(values[site], values[start], _only(gradient, h)) for h in heads], dim=2)

    def _split(self, out: Tensor, start: Tensor, layer: int) -> Split | None:
        """How the heads of a layer read; None where it cannot be told or does not hold."""
        linears = [p for p in self._passed[layer] if _is_linear(p.module)]
        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
        found = torch.autograd.grad(out, [p.made for p in linears], probe, retain_graph=True, allow_unused=True)
        used = [p for p, g in zip(linears, found, strict=True) if g is not None]
        if len(used) != 1:
            return None
        norms = [p for p in self._passed[layer] if p.made is used[0].given and p.given is start]
        if used[0].given is not start and not norms:
            return None
        columns = []
        for head in range(out.shape[2]):
            g = _vjp(out, used[0].made, _only(probe, head))
            columns.append((g != 0).flatten(0, -2).any(dim=0).nonzero().flatten())
        joined = torch.cat(columns)
        if len({len(c) for c in columns}) != 1 or len(joined.unique()) != len(joined):
            return None
        split = Split(used[0].module, norms[0].module if norms else None, torch.stack(columns))
        fast = self._fast(split, out, start, probe, layer)
        head = out.shape[2] // 2
        exact = _vjp(out, start, _only(probe, head))
        if fast is None or float((fast[:, :, head] - exact).abs().max()) > NEAR * float(exact.abs().max()):
            return None
        return split

    def _fast(self, split: Split, out: Tensor, start: Tensor, gradient: Tensor, layer: int) -> Tensor | None:
        """All heads from one step back to the product, one product per head, and the norm's own derivative."""
        call = next((p for p in self._passed[layer] if p.module is split.linear), None)
        if call is None:
            return None
        at = _vjp(out, call.made, gradient)[..., split.columns]
        weight: Tensor = split.linear.weight  # type: ignore[assignment]
        rows = (weight.T if is_transposed(split.linear) else weight)[split.columns]
        read = torch.einsum("bphc,hcd->bphd", at, rows)
        if split.norm is None:
            return read
        states = start.detach()[:, :, None].expand_as(read).requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(split.norm(states), states, read)[0]


def _keeper(calls: list[Passed]) -> Any:
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if len(given) == 1 and isinstance(out, Tensor) and out.requires_grad:
            calls.append(Passed(module, given[0], out))

    return keep


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_transposed(module)


def _only(gradient: Tensor, head: int) -> Tensor:
    masked = torch.zeros_like(gradient)
    masked[:, :, head] = gradient[:, :, head]
    return masked


def _vjp(out: Tensor, start: Tensor, gradient: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(out, start, gradient.to(out.dtype), retain_graph=True, allow_unused=True)
    return torch.zeros_like(start) if found is None else found
