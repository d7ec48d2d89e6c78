"""What sits at the places that are no module's border: torch calls, attention functions and experts functions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cutaway.models.attention import SoftmaxProbe, additive_mask, plain_attention
from cutaway.models.experts import (
    gather_acts,
    gather_gate,
    routed_by,
    run_experts,
    scatter_acts,
    scatter_gate,
    shows,
    widened,
)
from cutaway.models.plan import Attention, Layer
from cutaway.models.recorder import OpKey, op_name, operand_rank
from cutaway.models.selfcheck import random_numbers_kept

if TYPE_CHECKING:
    from cutaway.models.watch import Place, Watch


class Owner(TorchFunctionMode):
    """See, and change, chosen torch calls of one module's own forward; its children are left out."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.ops: dict[OpKey, list[tuple[Place, bool]]] = defaultdict(list)
        self.attention: AttentionSeer | None = None
        self._counts: Counter[tuple[str, int]] = Counter()
        self._depth = 0

    def begin(self) -> None:
        """A new run of the module."""
        self._counts.clear()
        self._depth = 0
        if self.attention is not None:
            self.attention.reset()

    def shift(self, by: int) -> None:
        """A child begins (1) or ends (-1)."""
        self._depth += by

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self._depth or not self.watch.on():
            return func(*args, **kwargs)
        name = op_name(func)
        rank = operand_rank(args, kwargs)
        nth = self._counts[name, rank]
        if rank:
            self._counts[name, rank] += 1
        if self.attention is not None:
            out = self.attention.call(func, name, (name, rank, nth), list(args), kwargs)
        else:
            out = func(*args, **kwargs)
        for key, places in self.ops.items():
            if (key.name, key.rank, key.nth) == (name, rank, nth):
                for place, clone in places:
                    out = self.watch.passed([place], out, clone)
        return out


ATTENTION_KINDS = ("attn.q", "attn.k", "attn.v", "attn.scores", "attn.pattern", "attn.z")


class AttentionSeer:
    """Reads and changes the insides of one layer's attention, however the layer calls it."""

    def __init__(self, watch: Watch, scope: str, layer: int, attention: Attention) -> None:
        self.watch, self.scope, self.layer, self.attention = watch, scope, layer, attention
        self.chunked = bool(scope) or attention.calls > 1
        self.offset = 0
        self._first_key = 0  # a sliding window's cache drops the oldest keys

    def reset(self) -> None:
        """A new run of the layer: its calls (vision towers may attend chunk by chunk) count from the first position."""
        self.offset = 0

    def _see(self, kind: str, x: Tensor, to: Any = lambda x: x, back: Any = lambda x: x, key: bool = False) -> Tensor:
        place = (self.scope, self.layer, f"attn.{kind}")
        if not self.watch.active(place):
            return x
        start = 0 if self.scope else self._first_key if key else self.watch.window.start
        chunk = self.offset if self.attention.calls > 1 else None
        return self.watch.see(place, x, to, back, start=start + self.offset, chunk=chunk)

    def _swap(self, kind: str, x: Tensor, key: bool = False) -> Tensor:
        """For tensors whose heads come before positions: [batch, head, pos, d_head]."""
        return self._see(kind, x, lambda t: t.transpose(1, 2), lambda t: t.transpose(1, 2), key)

    def _wants(self, *kinds: str) -> bool:
        return any(self.watch.active((self.scope, self.layer, f"attn.{k}")) for k in kinds)

    def interface(
        self,
        native: Any,
        own: Any,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """In place of the attention function that the module looked up."""
        if not self.watch.on():
            return native(module, query, key, value, *args, **kwargs)
        if self.watch.window.growing:
            self._first_key = max(0, self.watch.window.start + query.shape[-2] - key.shape[-2])
        query, key, value = self._swap("q", query), self._swap("k", key, True), self._swap("v", value, True)
        mask, rest = (args[0], args[1:]) if args else (kwargs.pop("attention_mask", None), ())
        if self._wants("scores", "pattern"):
            probe = SoftmaxProbe(key.shape[-2], lambda x: self._see("scores", x), lambda x: self._see("pattern", x))
            plain = native is own
            eager_mask = mask if plain else additive_mask(module, mask, query, key, kwargs)
            if plain or self.watch.changes(self.scope, self.layer, "attn.scores", "attn.pattern"):
                with probe:
                    out = own(module, query, key, value, eager_mask, *rest, **kwargs)
            else:
                out = native(module, query, key, value, mask, *rest, **kwargs)
                with _same_draws(module, query), probe:
                    own(module, query, key, value, eager_mask, *rest, **kwargs)
        else:
            out = native(module, query, key, value, mask, *rest, **kwargs)
        z = self._swap("z", out[0]) if self.attention.z_heads_first else self._see("z", out[0])
        if self.chunked:
            self.offset += query.shape[2]
        return (z, *out[1:])

    def call(
        self, func: Callable[..., Any], name: str, which: tuple[str, int, int], args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        """In place of one torch call of the attention module's own forward."""
        if self.attention.style == "sdpa":
            if name != "scaled_dot_product_attention":
                return func(*args, **kwargs)
            return self._sdpa(func, *args, **kwargs)
        keys = {key[1:]: role for role, key in self.attention.keys.items()}
        role = keys.get(which)
        if role == "softmax":
            return func(self._see("scores", args[0], *self._heads(args[0], False)), *args[1:], **kwargs)
        if role == "qk":
            return self._qk(func, args, kwargs)
        if role == "pv":
            at = 1 if name == "einsum" else 0
            pattern = self._see("pattern", args[at], *self._heads(args[at], False))
            value = self._see("v", args[at + 1], *self._heads(args[at + 1], True), key=True)
            z = func(*args[:at], pattern, value, *args[at + 2 :], **kwargs)
            return self._see("z", z, *self._heads(z, True))
        return func(*args, **kwargs)

    def _heads(self, like: Tensor, swap: bool) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """To [batch, pos, head, d], or [batch, head, query, key], and back; ``like`` may merge batch and heads."""
        rows, flat = self.watch.window.batch, like.ndim == 3

        def to(x: Tensor) -> Tensor:
            x = x.view(rows, -1, *x.shape[1:]) if flat else x
            return x.transpose(1, 2) if swap else x

        def back(x: Tensor) -> Tensor:
            x = x.transpose(1, 2) if swap else x
            return x.reshape(-1, *x.shape[2:]) if flat else x

        return to, back

    def _qk(self, func: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        names = [k for k in ("batch1", "batch2") if k in kwargs]
        q, k = (kwargs[n] for n in names) if names else args[-2:]
        to, back = self._heads(q, True)
        q = self._see("q", q, to, back)
        k = self._see("k", k, lambda x: to(x.transpose(-1, -2)), lambda x: back(x).transpose(-1, -2), key=True)
        if names:
            return func(*args, **{**kwargs, names[0]: q, names[1]: k})
        return func(*args[:-2], q, k, **kwargs)

    def _sdpa(self, func: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        query, key, value = self._swap("q", query), self._swap("k", key, True), self._swap("v", value, True)
        if not self._wants("scores", "pattern"):
            return self._swap("z", func(query, key, value, *args, **kwargs))
        probe = SoftmaxProbe(key.shape[-2], lambda x: self._see("scores", x), lambda x: self._see("pattern", x))
        if self.watch.changes(self.scope, self.layer, "attn.scores", "attn.pattern"):
            with probe:
                z = plain_attention(query, key, value, *args, **kwargs)
        else:
            z = func(query, key, value, *args, **kwargs)
            with _same_draws(None, query), probe:
                plain_attention(query, key, value, *args, **kwargs)
        return self._swap("z", z)


class ExpertsSeer:
    """Reads and changes the routing weights and the neurons of one layer's experts."""

    def __init__(self, watch: Watch, scope: str, layer: int, plan: Layer) -> None:
        self.watch, self.scope, self.layer, self.plan = watch, scope, layer, plan

    def __call__(
        self, native: Any, own: Any, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """In place of the experts function that the module looked up."""
        if not self.watch.on():
            bare: Tensor = native(module, hidden, index, weights)
            return bare
        rows, n = self.watch.window.batch, self.plan.n_experts
        split = lambda x: x.view(rows, -1, *x.shape[1:])  # noqa: E731
        merge = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        gate_place, act_place = ((self.scope, self.layer, f"expert.{k}") for k in ("gate", "act"))
        routed = None
        if self.watch.active(gate_place):
            gate = scatter_gate(index, weights, n)
            seen = self.watch.see(gate_place, gate, split, merge)
            if self.watch.changes(*gate_place):
                routed = routed_by(seen, index)
                index = index if routed is None else widened(routed)
                weights = gather_gate(index, seen)
        if not self.watch.active(act_place):
            out: Tensor = native(module, hidden, index, weights)
            return out

        def change(acts: Tensor) -> Tensor:
            full = scatter_acts(index, acts, n)
            full = full if routed is None else full * routed[..., None]
            seen = self.watch.see(act_place, full, split, merge)
            return gather_acts(index, seen)

        if shows(native) or self.watch.changes(*act_place):
            return run_experts(native, module, hidden, index, weights, change)
        out = native(module, hidden, index, weights)
        run_experts(native, module, hidden, index, weights, change)
        return out


def _same_draws(module: nn.Module | None, like: Tensor) -> AbstractContextManager[None]:
    """Around a second computation: its dropout draws leave no mark on the random numbers that follow."""
    if module is not None and not module.training:
        return nullcontext()
    return random_numbers_kept([like.device])
