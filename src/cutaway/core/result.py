"""What every method returns: numbers with named dimensions, where they came from, and whether they can be trusted."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

import numpy as np

from cutaway.core.compare import Difference, compare
from cutaway.core.errors import ResultError, nearest
from cutaway.core.proof import Check, Proof, Provenance

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = ["Array", "Check", "Difference", "Proof", "Provenance", "Result", "columns_over", "of_results", "over"]

Array: TypeAlias = Any
"""In: anything array-like, torch tensors too. Out: a read-only numpy array (float32/64, int64, uint8, bool or str)."""

Label: TypeAlias = str | int | float


def over(*dims: str, named_by: str = "") -> dict[str, Any]:
    """``field(metadata=over("layer", "head"))``: an array field with these dimensions, or those its field ``named_by``
    lists."""
    return {"dims": named_by or dims}


def columns_over(dim: str) -> dict[str, Any]:
    """``field(default_factory=dict, metadata=columns_over("item"))``: named 1-d arrays, all along ``dim``."""
    return {"dims": (dim,), "columns": True}


def of_results() -> dict[str, Any]:
    """``field(default_factory=dict, metadata=of_results())``: results of other kinds by name."""
    return {"results": True}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Result(ABC):
    """A value: typed arrays with named dimensions, labels along them, a unit, and the result's own evidence.

    A kind is a subclass ``class Grid(Kind, kind="grid")``; naming it is its only registration (``Result.kinds``).
    Arrays are copied at construction and read-only after; ``dataclasses.replace`` makes changed copies.

    Raises:
        ResultError: arrays or labels that do not line up, or numbers that cannot be stored.
    """

    kinds: ClassVar[dict[str, type[Result]]] = {}
    kind: ClassVar[str] = ""

    title: str = ""
    unit: str = ""
    labels: dict[str, tuple[Label, ...]] = field(default_factory=dict)
    made_by: Provenance | None = None
    check: Check | None = None
    proof: Proof | None = None
    notes: tuple[str, ...] = ()

    def __init_subclass__(cls, kind: str = "", **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if kind:
            cls.kind = kind
            Result.kinds[kind] = cls

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if "columns" in spec.metadata:
                value = {str(name): frozen_array(each, f"{spec.name} {name!r}") for name, each in value.items()}
            elif "dims" in spec.metadata:
                value = None if value is None else frozen_array(value, spec.name)
            elif spec.name == "labels":
                value = {dim: _labels(dim, each) for dim, each in value.items()}
            else:
                value = _plain(value)
            object.__setattr__(self, spec.name, value)
        self._line_up()

    def _line_up(self) -> None:
        dims = self.dims()
        sizes: dict[str, int] = {}
        for name, data in self.arrays().items():
            if data.ndim != len(dims[name]):
                raise ResultError(
                    f"{self.kind} {self.title!r}",
                    f"{name} has shape {data.shape}, its dimensions are ({', '.join(dims[name])})",
                    "give one axis per dimension",
                )
            for dim, size in zip(dims[name], data.shape, strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise ResultError(
                        f"{self.kind} {self.title!r}", f"{name} has {size} along {dim!r}, another array {sizes[dim]}"
                    )
        for dim, names in self.labels.items():
            if dim not in sizes:
                raise ResultError(
                    f"labels for {dim!r}", f"this {self.kind} has {', '.join(sizes)}", nearest(dim, sizes)
                )
            if len(names) != sizes[dim]:
                raise ResultError(f"labels for {dim!r}", f"{len(names)} labels for {sizes[dim]} places")

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array of this result by name; a column is named ``"field/column"``."""
        found: dict[str, np.ndarray] = {}
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if "columns" in spec.metadata:
                found |= {f"{spec.name}/{name}": each for name, each in value.items()}
            elif "dims" in spec.metadata and value is not None:
                found[spec.name] = value
        return found

    def dims(self) -> dict[str, tuple[str, ...]]:
        """The named dimensions of every array in ``arrays()``."""
        by_field: dict[str, Any] = {spec.name: spec.metadata.get("dims") for spec in dataclasses.fields(self)}
        found: dict[str, tuple[str, ...]] = {}
        for name in self.arrays():
            dims = by_field[name.partition("/")[0]]
            found[name] = getattr(self, dims) if isinstance(dims, str) else dims
        return found

    def along(self, dim: str) -> tuple[Label, ...]:
        """The labels along ``dim``; 0, 1, 2 ... where none were given."""
        if dim in self.labels:
            return self.labels[dim]
        for name, dims in self.dims().items():
            if dim in dims:
                return tuple(range(self.arrays()[name].shape[dims.index(dim)]))
        known = sorted({each for dims in self.dims().values() for each in dims})
        raise ResultError(f"dimension {dim!r}", f"this {self.kind} has {', '.join(known)}", nearest(dim, known))

    def held(self) -> dict[str, dict[str, Result]]:
        """The results that this one is made of, by field and name; empty for all kinds but those."""
        fields = (spec.name for spec in dataclasses.fields(self) if "results" in spec.metadata)
        return {name: dict(getattr(self, name)) for name in fields}

    def plain_fields(self) -> dict[str, Any]:
        """Every field that is neither an array, nor a result, nor labels, nor evidence."""
        apart = {"labels", "made_by", "check", "proof", "notes", *self.held()}
        return {
            spec.name: getattr(self, spec.name)
            for spec in dataclasses.fields(self)
            if "dims" not in spec.metadata and spec.name not in apart
        }

    def replace(self, **changes: Any) -> Self:
        """The same result with some fields changed."""
        return dataclasses.replace(self, **changes)

    def same_as(self, other: Result, rtol: float = 1e-5, atol: float = 1e-6) -> Difference:
        """Where ``other`` differs; falsy when equal. How, when and where it was made does not count (nor do ``notes``).

        Numbers agree within ``atol + rtol * |self|`` (NaN equals NaN); whole numbers and strings exactly.
        """
        return compare(self, other, rtol, atol)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Result):
            return NotImplemented
        return (self.made_by, self.notes) == (other.made_by, other.notes) and not self.same_as(other, 0, 0)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shapes = (
            f"{name}[{', '.join(f'{dim} {n}' for dim, n in zip(self.dims()[name], data.shape, strict=True))}]"
            for name, data in self.arrays().items()
        )
        return f"<{type(self).__name__} {self.title!r} {', '.join(shapes)}{f' in {self.unit}' if self.unit else ''}>"

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write ``result.json`` and ``arrays.safetensors``, all or nothing; returns the folder. See ``open_result``."""
        from cutaway.core.result_file import save

        return save(self, Path(folder), overwrite)

    @abstractmethod
    def table(self) -> pandas.DataFrame:
        """The numbers as a table, one row per value."""

    @abstractmethod
    def to_xarray(self) -> xarray.Dataset:
        """The arrays with their dimensions and labels."""

    @abstractmethod
    def spec(self, *args: Any, **options: Any) -> dict[str, Any]:
        """The picture as a Vega-Lite specification; ``options`` are the kind's own (which head, which layer)."""

    @abstractmethod
    def view(self, **options: Any) -> Any:
        """The picture as an altair chart."""

    @abstractmethod
    def summary(self) -> Any:
        """What to print in a terminal: a rich renderable of one screenful at most."""

    @abstractmethod
    def write(self, path: str | Path, **options: Any) -> Path:
        """Write one file by its suffix: .html, .png, .svg, .json or .csv; returns the path."""


def frozen_array(value: Any, what: str) -> np.ndarray:
    """``value`` as a read-only contiguous array of a dtype that the file format keeps exactly."""
    if hasattr(value, "detach"):  # a torch tensor; bfloat16 has no numpy form
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() and value.element_size() < 4 else value).numpy()
    ours = isinstance(value, np.ndarray) and (value.dtype in STORED or value.dtype == object)
    if ours and not value.flags.writeable and value.flags.c_contiguous:
        return value
    try:
        data = np.array(value, order="C")
    except ValueError as error:
        raise ResultError(what, f"it is not rectangular ({error})", "give one number or string per cell") from None
    if data.dtype.kind in "UO" or (data.size == 0 and data.dtype == object):
        data = np.array(value, dtype=object, order="C")
        wrong = next((each for each in data.flat if not isinstance(each, str)), None)
        if wrong is not None:
            raise ResultError(what, f"it holds a {type(wrong).__name__}", "give numbers or strings, not a mixture")
    elif data.dtype.kind == "f":
        data = data.astype(np.float64 if data.dtype.itemsize > 4 else np.float32)
    elif data.dtype.kind in "iu" and data.dtype != np.uint8:
        data = data.astype(np.int64)
    elif data.dtype not in STORED:
        raise ResultError(what, f"its dtype is {data.dtype}", "give real numbers, booleans or strings")
    data.flags.writeable = False
    return data


STORED = tuple(np.dtype(each) for each in ("float32", "float64", "int64", "uint8", "bool"))


def _labels(dim: str, value: Any) -> tuple[Label, ...]:
    names = tuple(value.tolist() if hasattr(value, "tolist") else value)
    for name in names:
        if isinstance(name, bool) or not isinstance(name, str | int | float) or (name != name):
            raise ResultError(f"labels for {dim!r}", f"{name!r} is among them", "use strings or finite numbers")
    return names


def _plain(value: Any) -> Any:
    """Lists become tuples and numpy scalars Python ones, so that fields compare and store alike everywhere."""
    if isinstance(value, list | tuple):
        return tuple(_plain(each) for each in value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value.item() if isinstance(value, np.generic) else value
