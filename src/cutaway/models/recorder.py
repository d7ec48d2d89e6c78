"""Record one forward pass as a graph: which torch call made each tensor, from which others, inside which module.

The graph is what the anatomy is read from. Nothing of the model is changed: modules get hooks that are removed again,
and the torch calls are seen through a TorchFunctionMode.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from cutaway.models.interface import ATTENTION


class OpKey(NamedTuple):
    """One torch call among those that a module's own forward makes: found again by counting, children left out.

    Calls are counted apart by name and by rank of their operands, so that an optional mask does not shift the count.
    """

    owner: str
    name: str
    rank: int
    nth: int


@dataclass(eq=False)
class Node:
    """One tensor of the forward pass."""

    tensor: Tensor
    op: str
    inputs: tuple[Node, ...] = ()
    key: OpKey | None = None
    call: tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any]] | None = None
    overwritten: bool = False
    output_of: list[tuple[str, int | None]] = field(default_factory=list)
    input_of: list[tuple[str, int | str]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.tensor.shape)


@dataclass
class AttentionCall:
    """One call of an attention function: its module, its operands, its result."""

    module: str
    how: Literal["interface", "sdpa", "inline"]
    q: Node
    k: Node
    v: Node
    z: Node
    scores: Node | None = None
    pattern: Node | None = None


@dataclass
class Frame:
    """One execution of one module: what came in and what went out, and all that it was called with."""

    path: str
    inputs: list[tuple[int | str, Node]]
    outputs: list[tuple[int | None, Node]] = field(default_factory=list)
    counts: Counter[tuple[str, int]] = field(default_factory=Counter)
    runs: int = 1
    calls: list[AttentionCall] = field(default_factory=list)
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, looking into lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


def remade(like: Any, items: Sequence[Any]) -> Any:
    """A list, tuple or named tuple of the same type, of other items."""
    return like._make(items) if hasattr(like, "_make") else type(like)(items)


def op_name(func: Callable[..., Any]) -> str:
    """A short name of a torch function: 'add', 'softmax', '__iadd__'."""
    name = getattr(func, "__name__", None) or str(func)
    if name == "__get__":
        name = (resolve_name(func) or name).rsplit(".", 2)[-2]
    return name


def operand_rank(args: Any, kwargs: Any) -> int:
    """The largest rank among the tensors of a call; known before the call is made."""
    return max((t.ndim for t in tensors([list(args), dict(kwargs)])), default=0)


def _storage(tensor: Tensor) -> int:
    """Address of what a tensor is a view of; 0 inside torch.vmap, where there is none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except NotImplementedError:
        return 0


def is_inplace(name: str) -> bool:
    """Whether a torch function writes into its first operand."""
    if name.startswith("__"):
        return (name.startswith("__i") and name not in ("__index__", "__invert__", "__int__")) or name == "__setitem__"
    return name.endswith("_")


class Recorder(TorchFunctionMode):
    """The graph of what runs inside ``with Recorder(root):``.

    ``on_exit(frame)`` is called for each module that finishes; ``forget()`` drops what was recorded so far.
    """

    def __init__(self, root: nn.Module, on_exit: Callable[[Frame], None]) -> None:
        super().__init__()
        self._root, self._on_exit = root, on_exit
        self._nodes: dict[int, Node] = {}
        self._stack: list[Frame] = [Frame("", [])]
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._handles: list[Any] = []
        self._attention: Any = None
        self._paused = False
        self._thread = threading.get_ident()

    # -- the graph ------------------------------------------------------------------------------------------------
    def node(self, tensor: Tensor) -> Node:
        """The node of a tensor; one that nothing recorded made is a leaf."""
        node = self._nodes.get(id(tensor))
        if node is None:
            node = self._nodes[id(tensor)] = Node(tensor, "leaf")
        return node

    def forget(self) -> None:
        """Drop the graph so far, so that its tensors can be freed."""
        self._nodes.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run something that is not recorded."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @property
    def nodes(self) -> list[Node]:
        """Every node recorded since the last ``forget``."""
        return list(self._nodes.values())

    @property
    def frame(self) -> Frame:
        """The module being run now."""
        return self._stack[-1]

    def _add(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        name = op_name(func)
        made = list(tensors(out)) if name != "__setitem__" else [args[0]]
        if not made:
            return
        inputs = tuple(self.node(t) for t in tensors([list(args), dict(kwargs)]))
        if is_inplace(name) and inputs:
            storage = _storage(inputs[0].tensor)
            for node in self._nodes.values():
                if storage and _storage(node.tensor) == storage:
                    node.overwritten = True
        elif any(t is n.tensor for t in made for n in inputs):
            return  # an identity, such as dropout outside training
        rank = operand_rank(args, kwargs)
        nth = self.frame.counts[name, rank]
        self.frame.counts[name, rank] += 1
        key = OpKey(self.frame.path, name, rank, nth)
        for tensor in made:
            self._nodes[id(tensor)] = Node(tensor, name, inputs, key, (func, args, kwargs))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._paused:
            return out
        if not isinstance(out, int | float | bool | torch.Size | torch.dtype | torch.device):
            self._add(func, args, kwargs, out)
            if op_name(func) == "scaled_dot_product_attention":
                q, k, v = (
                    (self.node(t) for t in args[:3])
                    if len(args) > 2
                    else (self.node(kwargs[n]) for n in ("query", "key", "value"))
                )
                self._called(AttentionCall(self.frame.path, "sdpa", q, k, v, self.node(out)))
        return out

    # -- modules --------------------------------------------------------------------------------------------------
    def _enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if self._paused or threading.get_ident() != self._thread:
            return
        path = self._paths[id(module)]
        found = [(i, self.node(a)) for i, a in enumerate(args) if isinstance(a, Tensor)]
        named = [(k, self.node(a)) for k, a in (kwargs or {}).items() if isinstance(a, Tensor)]
        frame = Frame(path, [*found, *named], args=tuple(args), kwargs=dict(kwargs or {}))
        for slot, node in frame.inputs:
            node.input_of.append((path, slot))
        self._stack.append(frame)

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if self._paused or threading.get_ident() != self._thread:
            return
        frame = self._stack.pop()
        single = isinstance(out, Tensor)
        listed = [(None, out)] if single else list(enumerate(out)) if isinstance(out, list | tuple) else []
        for slot, tensor in listed:
            if isinstance(tensor, Tensor):
                node = self.node(tensor)
                node.output_of.append((frame.path, slot))
                frame.outputs.append((slot, node))
        self._on_exit(frame)

    def _called(self, call: AttentionCall) -> None:
        for frame in self._stack:
            frame.calls.append(call)

    def _attended(
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
        path = self._paths.get(id(module), self.frame.path)
        nodes = [self.node(t) for t in (query, key, value)]
        depth = [len(frame.calls) for frame in self._stack]
        out = native(module, query, key, value, *args, **kwargs)
        for frame, n in zip(self._stack, depth, strict=True):
            del frame.calls[n:]
        z = self._nodes[id(out[0])] = Node(out[0], "attention", tuple(nodes))
        self._called(AttentionCall(path, "interface", nodes[0], nodes[1], nodes[2], z))
        return out

    # -- on and off -----------------------------------------------------------------------------------------------
    def __enter__(self) -> Recorder:
        for module in self._root.modules():
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave))
        self._attention = ATTENTION.watch(dict.fromkeys(self._paths, self._attended))
        self._attention.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attention.__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()
