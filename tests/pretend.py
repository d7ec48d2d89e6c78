"""A pretend accelerator: tensors on pretend:0 and pretend:1 hold ordinary numbers, and raise where those of CUDA would.

torch counts it as a device of its own (its private-use key, with a Python back end), so autograd, modules and attention
treat it as they treat a GPU, down to a thread of its own for the backward pass. What it sees: tensors of different
devices in one operation, numpy on device memory, generators and random numbers of the wrong device, matrix products
that CUDA has not. What it cannot see: CUDA's rounding, speed, memory, streams, and code that asks for "cuda" by name.

Imported by conftest, since a device has to be there before the first backward pass of a process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
COUNT = 2
aten = torch.ops.aten


class _Backend:
    """What torch asks of ``torch.pretend``. Nobody may choose the device by themselves: it says that there is none."""

    def __init__(self) -> None:
        self.generators = [torch.Generator().manual_seed(1000 + i) for i in range(COUNT)]

    def is_available(self) -> bool:
        return False

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        for i, generator in enumerate(self.generators):
            generator.manual_seed(seed + 1000 + i)  # another stream than the CPU's

    def get_rng_state(self, device: torch.device | int | str = 0) -> Tensor:
        return self.generators[_index(device)].get_state()

    def set_rng_state(self, state: Tensor, device: torch.device | int | str = 0) -> None:
        self.generators[_index(device)].set_state(state)


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return False

    def has_primary_context(self, dev_id: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


def _index(device: torch.device | int | str) -> int:
    return device if isinstance(device, int) else torch.device(device).index or 0


def _place(device: torch.device | str) -> torch.device:
    """The device with its number."""
    device = torch.device(device)
    if device.type != NAME:
        return device
    if _index(device) >= COUNT:
        raise RuntimeError(f"{NAME} error: invalid device ordinal {device.index}")
    return torch.device(NAME, _index(device))


class Pretend(Tensor):
    """A tensor that says it is elsewhere. ``_held`` has its numbers, ordinary ones, without a graph."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # modes still see its calls
    _held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, place: torch.device) -> Pretend:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: Pretend = Tensor._make_wrapper_subclass(cls, held.shape, **layout, device=place)  # type: ignore[attr-defined]
        made._held = held
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, Pretend):
            raise TypeError(f"a tensor of {self.device} cannot take the place of its data from {new.device}")
        Tensor.data.__set__(self, new)
        self._held = new._held

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")
        return self.detach().cpu().numpy()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def data_ptr(self) -> int:
        return self._held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self._held.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            copied.__dict__.update({k: v for k, v in vars(self).items() if k != "_held"})
            memo[id(self)] = copied
        return memo[id(self)]

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.ndim == 0 else self.detach().cpu(), spec)

    def __repr__(self, **_: Any) -> str:
        return f"{self.detach().cpu()} on {self.device}"


# -- one operation -----------------------------------------------------------------------------------------------------
CROSSING = {aten.copy_.default, aten._copy_from.default, aten._to_copy.default}
"""Operations whose purpose is to go from one device to another."""
INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor}
PUTTING = {
    aten.index_put.default,
    aten.index_put_.default,
    aten._unsafe_index_put.default,
    aten._index_put_impl_.default,
}
FILLING = {aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill.Tensor, aten.fill_.Tensor, aten.where.self}
"""Operations besides elementwise ones of two operands that take a 0-dim tensor of the CPU for a number."""
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot}
"""Products that CUDA has for floating point numbers only."""


class _Signature(NamedTuple):
    """What is known of an operation before it runs."""

    names: tuple[str, ...]
    written: frozenset[str]
    gives_written: bool
    draws: bool
    pair: bool


@cache
def _signature(func: Any) -> _Signature:
    schema = func._schema
    names = tuple(a.name for a in schema.arguments)
    written = frozenset(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    gives = [r for r in schema.returns if r.alias_info is not None and r.alias_info.is_write]
    if gives and (len(gives) > 1 or len(written) != 1):
        raise NotImplementedError(f"the pretend device knows no {func}: several operands are written")
    operands = sum("Tensor" in str(a.type) for a in schema.arguments)
    pair = torch.Tag.pointwise in func.tags and operands <= 2
    return _Signature(names, written, bool(gives), torch.Tag.nondeterministic_seeded in func.tags, pair)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _held(value: Any) -> Any:
    if isinstance(value, Pretend):
        return value._held
    return type(value)(_held(v) for v in value) if isinstance(value, list | tuple) else value


def _wrapped(value: Any, place: torch.device) -> Any:
    if isinstance(value, Tensor):
        return Pretend(value, place)
    return type(value)(_wrapped(v, place) for v in value) if isinstance(value, list | tuple) else value


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    about = _signature(func)
    given = dict(zip(about.names, args, strict=False)) | kwargs
    here = _common(func, about, given)
    place = _place(given["device"]) if given.get("device") is not None else here
    asked = {k: _held(v) for k, v in kwargs.items()}
    if "device" in asked:
        asked["device"] = torch.device("cpu")
    if about.draws:
        _check_generator(func, given.get("generator"), here)
    if func is aten.histc.default and not given["self"].is_floating_point():  # which CUDA has, and the CPU has not
        return _wrapped(aten.histc(_held(given["self"]).double(), *args[1:], **asked).to(given["self"].dtype), place)
    with _stream(here) if about.draws and given.get("generator") is None else nullcontext():
        out = func(*(_held(a) for a in args), **asked)
    if torch.Tag.inplace_view in func.tags:
        with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
            func(*args, **kwargs)  # the shape of the wrapper
    for name in about.written:
        _check_shape(func, given[name])
    if about.gives_written:
        return given[next(iter(about.written))]
    return out if place.type == "cpu" else _wrapped(out, place)


def _common(func: Any, about: _Signature, given: dict[str, Any]) -> torch.device:
    """The device where the operation runs. Raises where CUDA would."""
    tensors = [(name, t) for name, value in given.items() for t in _tensors(value)]
    places = {t.device: None for _, t in tensors if isinstance(t, Pretend)}
    here = next(iter(places))
    if func in CROSSING:
        return here
    first = tensors[0][1]
    if func in INDEXING or func in PUTTING:
        here = first.device
        wrong = [t.device for n, t in tensors if n == "indices" and t.device not in (here, torch.device("cpu"))]
        if wrong:
            raise RuntimeError(
                f"indices should be either on cpu or on the same device as the indexed tensor ({here}), not {wrong[0]}"
            )
        away = [t.device for n, t in tensors if n == "values" and t.device != here and t.ndim]
    else:
        scalars = about.pair or func in FILLING
        away = [
            t.device for n, t in tensors
            if t.device != here and not (scalars and t.ndim == 0 and t.device.type == "cpu" and n not in about.written)
        ]  # fmt: skip
    if away:
        found = f"found at least two devices, {here} and {away[0]}! ({func})"
        raise RuntimeError(f"Expected all tensors to be on the same device, but {found}")
    if func.overloadpacket in PRODUCTS and not (first.is_floating_point() or first.is_complex()):
        raise NotImplementedError(f'"{func.overloadpacket.__name__}_cuda" not implemented for {first.dtype}')
    return here


def _check_generator(func: Any, generator: torch.Generator | None, place: torch.device) -> None:
    if generator is not None and generator.device.type != place.type:
        found = generator.device.type
        raise RuntimeError(f"Expected a '{place.type}' device type for generator but found '{found}' ({func})")


@contextmanager
def _stream(place: torch.device) -> Iterator[None]:
    """Inside, random numbers are the device's own: others than the CPU's, and its are left as they were."""
    generator = torch.pretend.generators[_index(place)]  # type: ignore[attr-defined]
    before = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
        generator.set_state(torch.get_rng_state())
    finally:
        torch.set_rng_state(before)


def _check_shape(func: Any, written: Tensor) -> None:
    if isinstance(written, Pretend) and (written.shape, written.stride()) != (
        written._held.shape,
        written._held.stride(),
    ):
        raise NotImplementedError(f"the pretend device knows no {func}: it changes a shape in place")


# -- tensors out of nothing --------------------------------------------------------------------------------------------
def _factory(func: Any) -> Callable[..., Tensor]:
    draws = any(a.name == "generator" for a in func._schema.arguments) or torch.Tag.nondeterministic_seeded in func.tags

    def make(*args: Any, device: torch.device, **kwargs: Any) -> Tensor:
        place = _place(device)
        if draws:
            _check_generator(func, kwargs.get("generator"), place)
        with _stream(place) if draws and kwargs.get("generator") is None else nullcontext():
            return Pretend(func(*args, **kwargs, device=torch.device("cpu")), place)

    return make


def _factories() -> Iterator[tuple[str, Any]]:
    """The operations that are told apart by their device alone."""
    for name in torch._C._dispatch_get_all_op_names():
        space, _, full = name.partition("::")
        packet, _, overload = full.partition(".")
        if space == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(name, "BackendSelect"):
            func = getattr(getattr(aten, packet), overload or "default")
            asked = func._schema.arguments
            if any(a.name == "device" for a in asked) and not any("Tensor" in str(a.type) for a in asked):
                yield full, func


def _register() -> torch.library.Library:
    _setup_privateuseone_for_python_backend(NAME, _Backend(), _Hooks())
    library = torch.library.Library("aten", "IMPL")
    for name, func in _factories():
        library.impl(name, _factory(func), "PrivateUse1")

    def copied(source: Tensor, into: Tensor, non_blocking: bool = False) -> Tensor:
        _held(into).copy_(_held(source))
        return into

    library.impl("_copy_from", copied, "PrivateUse1")  # these two run below Tensor subclasses in torch.tensor(...)
    library.impl("_local_scalar_dense", lambda x: aten._local_scalar_dense(_held(x)), "PrivateUse1")
    return library


LIBRARY = _register()
