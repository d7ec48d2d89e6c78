"""How each layer takes the residual stream in: the norm and the matrix in front of its queries, keys, values and MLP.

Nothing is read off a name: one recorded pass shows which module's output each part reads, which columns of a matrix
belong to which head, and that the norm in front is one whose derivative is known. With that, one product with a matrix
brings the gradient of every head's input to the residual stream, or gives every head an input of its own.

Where heads are not cut out of one matrix (their queries are normed together, or come through two matrices in a row)
the layer itself is the front: autograd brings each head's gradient back, and the layer is called once for each head's
own input. Slower, exact, and all that it takes is that the layer attends.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cutaway.core.errors import UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Apply, Where
from cutaway.core.trace import Trace
from cutaway.ops.norms import Norm, measure
from cutaway.ops.watched import WatchedModel
from cutaway.ops.wiring import SIDES, Wiring
from cutaway.ops.writers import rows_of


@dataclass(frozen=True)
class Intake:
    """The norm in front of one part of a layer.

    Attributes:
        path: module path; "" when the part reads the stream as it is.
        norm: what it does; None without one.
    """

    path: str = ""
    norm: Norm | None = None

    def run(self, model: WatchedModel, x: Tensor) -> Tensor:
        """[..., d] what the part reads of residual states."""
        return x if not self.path else model.hf.get_submodule(self.path)(x)

    def rows(self, rows: Tensor) -> Tensor:
        """[..., d] rows of a matrix behind the norm, as they meet the stream but for the scale: P(gain rows)."""
        return rows if self.norm is None else self.norm.centred(rows * self.norm.gain)

    def pull(self, x: Tensor, n: Tensor) -> Pull:
        """The transposed derivative at residual states ``x`` [..., d] that the norm makes ``n``."""
        if self.norm is None:
            return Pull(self, torch.ones_like(x[..., 0], dtype=torch.float32), None)
        inverse = self.norm.inverse_scale(x.float(), n.float())
        return Pull(self, inverse, self.norm.centred(x.float()) if self.norm.divides else None)


class Pull(NamedTuple):
    """The transposed derivative of a norm ``gain * P(x) / s(x) + shift`` at some states; s² is the mean of P(x)².

        g  ->  P(gain g) / s  -  P(x) <P(x), gain g> / (d s³)

    Attributes:
        intake: the norm. inverse: [...] 1 / s. x: [..., d] P(x); None when there is no scale.
    """

    intake: Intake
    inverse: Tensor
    x: Tensor | None

    def __call__(self, g: Tensor) -> Tensor:
        """[..., d] gradients at the norm's input, of those at its output."""
        pulled = self.intake.rows(g) * self.inverse[..., None]
        bent = self.bent(pulled)
        return pulled if bent is None else pulled - bent

    def bent(self, pulled: Tensor) -> Tensor | None:
        """[..., d] what the moving scale takes off the gradients ``P(gain g) / s``; None: there is no scale."""
        if self.x is None:
            return None
        share = (self.x * pulled).sum(-1, keepdim=True) * (self.inverse**2)[..., None] / pulled.shape[-1]
        return self.x * share

    def moving(self, change: Tensor) -> Tensor | None:
        """[sender, token] ``<change, P(x)> / (d s²)`` of changes [sender, token, d]: how far each moves the scale.

        Times ``<P(x), pulled>`` of a gradient this is what its product with the change loses. None: there is no scale.
        """
        if self.x is None:
            return None
        weight = self.inverse.flatten() ** 2 / self.x.shape[-1]
        return torch.einsum("std,td->st", change, self.x.flatten(0, -2) * weight[:, None])


@dataclass(frozen=True)
class Side:
    """The matrix behind the queries, keys or values of a layer.

    Attributes:
        path: module path. columns: [head, c] which of its outputs make each head.
    """

    path: str
    columns: Tensor

    def rows(self, model: WatchedModel) -> tuple[Tensor, Tensor | None]:
        """([head, c, d] what each of those outputs reads, [head, c] its bias)."""
        rows, bias = rows_of(model, self.path)  # [d, out]
        taken = rows.T[self.columns.flatten()].unflatten(0, tuple(self.columns.shape))
        return taken.float(), None if bias is None else bias[self.columns].float()


@dataclass(frozen=True)
class Front:
    """How one layer reads the stream.

    Attributes:
        sides: the matrices of "q", "k" and "v"; None where the heads are not cut out of one, and the layer is asked.
        attention: the norm that all of them read.
        mlp: the norm in front of the MLP. at_norm: the MLP has no one input of its own: its norm's output stands for
            it. gate: path of the output matrix of heads that are multiplied by a gate before; "" without one.
    """

    sides: dict[str, Side | None]
    attention: Intake
    mlp: Intake
    at_norm: bool
    gate: str = ""

    @property
    def matrices(self) -> list[str]:
        """Paths of the matrices, each once."""
        return list(dict.fromkeys(side.path for side in self.sides.values() if side is not None))

    @property
    def asked(self) -> list[str]:
        """The sides that the layer is asked for."""
        return [name for name, side in self.sides.items() if side is None]


class _Call(NamedTuple):
    path: str
    given: Tensor
    out: Tensor
    matrix: bool


_known: WeakKeyDictionary[Any, dict[tuple[Any, ...], list[Front]]] = WeakKeyDictionary()


def read_fronts(model: WatchedModel, inputs: Inputs, wiring: Wiring) -> list[Front]:
    """The front of every layer, read from one pass over the first row; read once per model.

    Raises:
        UnsupportedError: what lies in front of a layer's MLP is no norm.
    """
    key = (wiring, inputs.has_images, model.dtype)
    known = _known.setdefault(model.hf, {})
    if key not in known:
        known[key] = _read(model, inputs if inputs.has_images else inputs.row(0), wiring)
    return known[key]


def _read(model: WatchedModel, inputs: Inputs, wiring: Wiring) -> list[Front]:
    n = len(wiring.heads)
    calls: list[list[_Call]] = [[] for _ in range(n)]
    seen: dict[tuple[int, str], Tensor] = {}

    def keep(x: Tensor, where: Where) -> Tensor:
        kind = where.site.kind.rpartition(".")[2]
        first = where.site.layer == 0 and kind == "resid_pre"  # gradients begin here, also where weights take none
        seen[where.site.layer, kind] = own = x.detach().requires_grad_() if first else x.view_as(x)
        return own

    want = [f"L{n - 1}.resid_post"]
    for i, layer in enumerate(model.layers):
        want += [f"L{i}.{kind}" for kind in ("resid_mid", "mlp.in") if layer.has(kind)]
    with ExitStack() as exits:
        for i, layer in enumerate(model.layers):
            _listen(model, layer.path, calls[i], exits)
        kinds = ("resid_pre", "resid_post", *(f"attn.{side}" for side in SIDES))
        do = [Apply(f"L*.{kind}", keep) for kind in kinds]
        trace = model.trace(inputs, want=want, do=do, grad=True, stop=True)
    if seen[0, "resid_pre"].shape[1] != inputs.ids.shape[1]:
        found = f"its layers run over {seen[0, 'resid_pre'].shape[1]} positions for {inputs.ids.shape[1]} tokens"
        raise UnsupportedError(f"the edges of {model.name}", found, "")
    for i in range(n - 1):
        _unchanged(model, i, seen[i, "resid_post"], seen[i + 1, "resid_pre"])
    return [_front(model, i, trace, calls[i], {kind: x for (at, kind), x in seen.items() if at == i}) for i in range(n)]


def _listen(model: WatchedModel, path: str, calls: list[_Call], exits: ExitStack) -> None:
    """Keep input and output of every module of a layer that maps one tensor to one."""
    for name, module in model.hf.get_submodule(path).named_modules(prefix=path):
        weight = getattr(module, "weight", None)
        matrix = isinstance(weight, Tensor) and weight.ndim == 2

        def seen(
            _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, name: str = name, matrix: bool = matrix
        ) -> None:
            given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            if len(given) == 1 and isinstance(out, Tensor):
                calls.append(_Call(name, given[0], out, matrix))

        exits.callback(module.register_forward_hook(seen, with_kwargs=True).remove)


def _unchanged(model: WatchedModel, i: int, post: Tensor, pre: Tensor) -> None:
    """Between two layers the model adds nothing that it computes from the stream (Idefics attends to images there)."""
    if not (pre.requires_grad and post.requires_grad):
        raise UnsupportedError(f"the edges of {model.name}", f"no gradient passes from layer {i} to layer {i + 1}", "")
    given = _random(pre)
    (back,) = torch.autograd.grad(pre, post, given, retain_graph=True, allow_unused=True)
    if back is None or not torch.equal(back, given.view(back.shape)):
        found = f"between layers {i} and {i + 1} it computes something from the stream and adds it"
        raise UnsupportedError(f"the edges of {model.name}", found, "")


def _front(model: WatchedModel, i: int, trace: Trace, calls: Sequence[_Call], seen: dict[str, Tensor]) -> Front:
    layer, asked = model.layers[i], f"how layer {i} of {model.name} reads the residual stream"
    if layer.attention.calls > 1:
        raise UnsupportedError(asked, f"it attends in {layer.attention.calls} separate chunks")
    pre, gate = seen["resid_pre"], layer.w_o if layer.gated else ""
    attention, read = _attention_intake(model, pre, seen, calls, f"{asked}: its attention")
    sides = _apart({side: _side(seen[side], read, calls) for side in SIDES})
    middle = pre if layer.parallel else trace[f"L{i}.resid_mid"] if layer.has("resid_mid") else None
    if middle is None:
        raise UnsupportedError(asked, layer.refused.get("resid_mid", "the state before its MLP is not seen"))
    if layer.has("mlp.in"):
        mlp = _intake(model, middle, trace[f"L{i}.mlp.in"], calls, f"{asked}: its MLP")
        return Front(sides, attention, mlp, False, gate)
    norms = [c for c in calls if not c.matrix and same(c.given, middle) and not same(c.out, read)]
    norms = [c for c in norms if c.out.shape[-1] == layer.d_model and not same(c.out, middle)]
    found = "what its experts alone read is not the output of one norm"
    if len(norms) != 1:
        raise UnsupportedError(asked, found)
    try:
        mlp = _intake(model, middle, norms[0].out, calls, f"{asked}: its MLP")
    except UnsupportedError as problem:
        raise UnsupportedError(asked, found) from problem
    return Front(sides, attention, mlp, True, gate)


def _attention_intake(
    model: WatchedModel, pre: Tensor, seen: dict[str, Tensor], calls: Sequence[_Call], asked: str
) -> tuple[Intake, Tensor]:
    """(the norm that all queries, keys and values come through, its output); the stream itself where there is none."""
    heads = [seen[side] for side in SIDES if seen[side].requires_grad]
    if not heads or not pre.requires_grad:
        raise UnsupportedError(asked, "no gradient passes through it")
    given = [_random(x) for x in heads]
    norms = [c for c in calls if not c.matrix and c.out.requires_grad and same(c.given, pre) and not same(c.out, pre)]
    for call in norms:
        at, through = torch.autograd.grad(heads, [pre, call.out], given, allow_unused=True, retain_graph=True)
        if at is None or through is None:
            continue
        (back,) = torch.autograd.grad(call.out, pre, through, retain_graph=True)
        if float((back - at).abs().max()) <= max(1e-4, 16 * torch.finfo(at.dtype).eps) * float(at.abs().max()):
            return _intake(model, pre, call.out, calls, asked), call.out
    return Intake(), pre


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same states, however their rows are arranged."""
    return a.numel() == b.numel() and a.shape[-1] == b.shape[-1] and torch.equal(a.flatten(), b.flatten())


def _random(like: Tensor) -> Tensor:
    """Numbers from 0.5 to 1.5, always the same."""
    return (torch.rand(like.shape, generator=torch.Generator().manual_seed(0)) + 0.5).to(like)


def _side(heads: Tensor, read: Tensor, calls: Sequence[_Call]) -> Side | None:
    """The matrix whose outputs alone make queries, keys or values [row, pos, head, d], and which make each head.

    None when it is not one that reads ``read``, or when one of its outputs is in several heads.
    """
    matrices = [call for call in calls if call.matrix and call.out.requires_grad]
    if not heads.requires_grad or not matrices:
        return None
    given = _random(heads)
    outs = [call.out for call in matrices]
    found = torch.autograd.grad(heads, outs, given, allow_unused=True, retain_graph=True)
    behind = [call for call, g in zip(matrices, found, strict=True) if g is not None]
    if len(behind) != 1 or not same(behind[0].given, read):
        return None
    columns = []
    for h in range(heads.shape[2]):
        one = torch.zeros_like(given)
        one[:, :, h] = given[:, :, h]
        (g,) = torch.autograd.grad(heads, behind[0].out, one, retain_graph=True)
        columns.append(g.flatten(0, -2).any(0).nonzero().flatten())
    if len({len(c) for c in columns}) != 1 or len(torch.cat(columns).unique()) != sum(map(len, columns)):
        return None
    return Side(behind[0].path, torch.stack(columns))


def _apart(sides: dict[str, Side | None]) -> dict[str, Side | None]:
    """The sides, without those that share outputs of one matrix, as keys that are the values do."""

    def alone(name: str, side: Side) -> bool:
        others = [x for other, x in sides.items() if other != name and x is not None and x.path == side.path]
        return not any(bool(torch.isin(side.columns, other.columns).any()) for other in others)

    return {name: side if side is not None and alone(name, side) else None for name, side in sides.items()}


def final_intake(model: WatchedModel) -> Intake | None:
    """The norm in front of the logits; None when the first step on the way to them is none."""
    tail = model.anatomy().tail
    if not tail or not tail[0].module:
        return None
    d = model.layers[-1].d_model
    state = torch.randn(1, d, generator=torch.Generator().manual_seed(1)).to(model.device, model.dtype)
    try:
        return _measured(model, tail[0].module, state, f"the way to the logits of {model.name}")
    except UnsupportedError:
        return None


def _intake(model: WatchedModel, x: Tensor, n: Tensor, calls: Sequence[_Call], asked: str) -> Intake:
    """The norm that makes ``n`` of residual states ``x``."""
    x, n = x.detach(), n.detach()
    if same(x, n):
        return Intake()
    path = next((c.path for c in calls if not c.matrix and same(c.given, x) and same(c.out, n)), None)
    if path is None:
        raise UnsupportedError(asked, "reads it through something else than one norm")
    return _measured(model, path, x.reshape(-1, x.shape[-1])[-1:], asked)


def _measured(model: WatchedModel, path: str, state: Tensor, asked: str) -> Intake:
    """The norm at ``path``, its derivative compared with autograd's at a state [1, d]."""
    module = model.hf.get_submodule(path)
    intake = Intake(path, measure(module, state.shape[-1], state.device, model.dtype, f"the norm {path}"))
    state = state.clone().requires_grad_()
    g = torch.randn(state.shape, generator=torch.Generator().manual_seed(0)).to(state)
    with torch.enable_grad():
        out = module(state)
        (exact,) = torch.autograd.grad(out, state, g)
    ours = intake.pull(state.detach(), out.detach())(g.float())
    error = float((ours - exact.float()).abs().max()) / (float(exact.abs().max()) or 1.0)
    if not error <= max(1e-3, 16 * torch.finfo(model.dtype).eps):
        raise UnsupportedError(asked, f"the derivative of its norm {path} is off by {error:.2g}")
    return intake
