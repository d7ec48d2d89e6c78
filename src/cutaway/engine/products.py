"""Faster ways to the same numbers while packed rows go through a layer: matrix products and activation functions.

Nothing is set on the model or in torch: products are answered while our own function mode is on in this thread, and
activation modules get an empty input and have their output replaced by hooks that are taken off again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LEAST_WEIGHTS = 2**16
"""Numbers in a matrix below which a call costs more than a better product gives back."""
TRIAL_ROWS, TRIAL_IN, TRIAL_OUT, TRIALS = 64, 768, 3072, 7
"""The products that decide: the best of so many of each. Both take a few milliseconds."""
WORTH = 1.05
"""How much faster the other product has to be: a processor where both are alike keeps torch's own."""
SAME = 1e-5
"""Largest difference, relative to the largest value, of ways that count as the same."""

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``x @ weight.T + bias`` for x [..., in] and weight [out, in]."""


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product by oneDNN, which torch itself asks for other types only. The operator is private to torch."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def better_product(candidate: Product, own: Product = functional.linear) -> bool:
    """Whether ``candidate`` runs here, gives what torch's own product gives, and gives it faster.

    On processors that MKL is not tuned for oneDNN is ahead; on others both are alike (benchmarks/LOG.md).
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(TRIAL_ROWS, TRIAL_IN, generator=draw)
    weight = torch.randn(TRIAL_OUT, TRIAL_IN, generator=draw)
    bias = torch.randn(TRIAL_OUT, generator=draw)
    seconds: dict[Product, list[float]] = {own: [], candidate: []}
    try:
        with torch.no_grad():
            for turned in (weight, weight.T.contiguous().T):  # both ways that modules keep their weights
                if not _same(candidate(x, turned, bias), own(x, turned, bias)):
                    return False
            if not _same(candidate(x, weight, None), own(x, weight, None)):
                return False
            for _ in range(TRIALS):
                for product, taken in seconds.items():
                    start = time.thread_time()  # what other processes take does not count
                    product(x, weight, bias)
                    taken.append(time.thread_time() - start)
    except (AttributeError, RuntimeError, TypeError):  # no such operator in this torch, or not for this processor
        return False
    return min(seconds[candidate]) * WORTH <= min(seconds[own])


@cache
def chosen_product(threads: int) -> Product | None:
    """The product to use in place of torch's own with so many threads, measured at first use; None for torch's own."""
    return onednn if better_product(onednn) else None


class _Products(TorchFunctionMode):
    """While on, products of float32 rows with large enough matrices on the CPU are answered by ``product``."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and not kwargs and 2 <= len(args) <= 3:
            x, weight, bias = (*args, None)[:3]
            if _served(x, weight, bias):
                return self.product(x, weight, bias)
        elif func is torch.addmm and not kwargs and len(args) == 3:
            bias, x, weight = args
            if bias.ndim == 1 and _served(x, weight.T, bias):
                return self.product(x, weight.T, bias)
        return func(*args, **(kwargs or {}))


def _served(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 for t in (x, weight, bias) if t is not None)
        and x.device.type == weight.device.type == "cpu"
        and x.layout == weight.layout == torch.strided
        and weight.ndim == 2
        and weight.numel() >= LEAST_WEIGHTS
        and x.numel() > 0
        and (bias is None or (bias.ndim == 1 and bias.shape[0] == weight.shape[0]))
        and not torch.is_grad_enabled()
    )


def fast_products(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """While open, this thread's products run the fastest way known here."""
    if device.type != "cpu" or dtype != torch.float32:
        return nullcontext()
    product = chosen_product(torch.get_num_threads())
    return nullcontext() if product is None else _Products(product)


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


_fused: dict[type, Callable[[Tensor], Tensor] | None] = {}


def fused(kind: type) -> Callable[[Tensor], Tensor] | None:
    """One call that gives what an activation class of transformers spells out in many; None where there is none."""
    if kind not in _fused:
        _fused[kind] = _find_fused(kind)
    return _fused[kind]


def _find_fused(kind: type) -> Callable[[Tensor], Tensor] | None:
    if kind.__module__ != "transformers.activations":
        return None
    try:
        module: nn.Module = kind()
    except TypeError:
        return None
    x = torch.linspace(-12, 12, 4801)
    with torch.no_grad():
        own = module(x)
        if any(True for _ in module.parameters()) or not isinstance(own, Tensor):
            return None
        return _gelu_tanh if _same(_gelu_tanh(x), own) else None


@contextmanager
def fast_activations(layer: nn.Module) -> Iterator[None]:
    """While open, this thread's runs of the layer take its activation functions in one call where there is one."""
    thread = threading.get_ident()
    given: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> Any:
        if threading.get_ident() != thread or len(args) != 1 or args[0].dtype != torch.float32:
            return None
        given.append(args[0])
        return (args[0][:0],)

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        if threading.get_ident() != thread or not given:
            return None
        function = fused(type(module))
        return None if function is None else function(given.pop())

    chosen = [m for m in layer.modules() if fused(type(m)) is not None and not m._forward_hooks | m._forward_pre_hooks]
    handles = [h for m in chosen for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= SAME * float(b.abs().max())
