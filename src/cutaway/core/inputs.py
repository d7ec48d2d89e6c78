"""Inputs: what goes into a model, and what each position is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from cutaway.core.errors import InputError, MismatchError, SiteRangeError
from cutaway.core.site import Items


@dataclass(frozen=True)
class PatchGrid:
    """Where the image positions of one image lie in its pixels.

    Attributes:
        row: row of the batch the image belongs to.
        positions: token position of each patch, in the padded axis, in the order of ``boxes``.
        boxes: [patch, 4] left, top, right, bottom of each patch in pixels of the image as given.
        shape: (rows, columns) of the grid; several grids (tiles) of one image are several PatchGrids.
        image: number of the image, in the order given.
    """

    row: int
    positions: tuple[int, ...]
    boxes: Tensor
    shape: tuple[int, int]
    image: int = 0


@dataclass(frozen=True, eq=False)
class Inputs:
    """Token ids, mask, token strings, roles and image patches of a batch.

    Attributes:
        ids: [batch, pos] token ids.
        mask: [batch, pos] 1 for real tokens, 0 for padding (either side).
        tokens: token strings, per row, padding included.
        roles: "text", "image", "special" or "pad" per row and position.
        extra: what else the model's forward takes (pixel_values, ...), passed as it is.
        grids: one PatchGrid per image (or tile) whose positions are known.
        images: the images as given (PIL), for pictures; may be empty.
        side: "decoder_" where the tokens are what a decoder reads, beside an encoder whose inputs are in ``extra``.
    """

    ids: Tensor
    mask: Tensor
    tokens: tuple[tuple[str, ...], ...]
    roles: tuple[tuple[str, ...], ...]
    extra: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    grids: tuple[PatchGrid, ...] = ()
    images: tuple[Any, ...] = ()
    side: str = ""

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.mask.shape != self.ids.shape:
            found = f"ids {list(self.ids.shape)} and mask {list(self.mask.shape)}"
            raise InputError("inputs", found, "both are [batch, pos]")
        if not bool(self.mask.any(dim=1).all()):
            raise InputError("inputs", "a row has no real token", "give every row at least one token")

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Number of real tokens of each row."""
        return [int(n) for n in self.mask.sum(dim=1)]

    @property
    def last(self) -> list[int]:
        """Padded index of each row's last real token."""
        return [row[-1] for row in self.real]

    @property
    def real(self) -> list[list[int]]:
        """Padded indices of the real tokens, per row."""
        return [row.nonzero().flatten().tolist() for row in self.mask.cpu()]

    @property
    def has_images(self) -> bool:
        """Whether pixels, or features of an image (or of whatever else a model reads), go in with the tokens."""
        given = [v for v in self.extra.values() if isinstance(v, Tensor)]
        return any(v.is_floating_point() or not self._per_token(v) for v in given)

    @property
    def padded(self) -> bool:
        """Whether any row has padding."""
        return not bool(self.mask.all())

    def select(self, positions: Items | str | None, whole: str = "positions") -> list[list[int]]:
        """Padded indices that ``positions`` names, per row; every row has the same number of them.

        Raises:
            SiteRangeError: a position outside a row. MismatchError: a role of unequal counts over the rows.
        """
        real = self.real
        if positions is None:
            return [list(range(self.ids.shape[1])) for _ in real]
        if isinstance(positions, str):
            rows = [
                [p for p in row if positions == "all" or self.roles[b][p] == positions] for b, row in enumerate(real)
            ]
            if len({len(row) for row in rows}) > 1:
                counts = [len(row) for row in rows]
                raise MismatchError(
                    f"{whole}", f"rows have {counts} {positions} positions", "trace the rows one by one"
                )
            if not rows[0]:
                raise SiteRangeError(f"{whole}", f"the inputs have no {positions} position", "name positions by number")
            return rows
        return [[row[i] for i in positions.resolve(len(row), "position", whole)] for row in real]

    def row(self, b: int) -> Inputs:
        """Row ``b`` alone, padding removed. Image inputs are kept only when there is one row."""
        if len(self) > 1 and any(not self._per_token(v) for v in self.extra.values()):
            raise InputError(f"row {b} of a batch with images", "image tensors cannot be split by row", "build one row")
        keep = self.real[b]
        return replace(
            self,
            ids=self.ids[b : b + 1, keep],
            mask=self.mask[b : b + 1, keep],
            extra={k: v[b : b + 1, keep] if self._per_token(v) else v for k, v in self.extra.items()},
            tokens=(tuple(self.tokens[b][p] for p in keep),),
            roles=(tuple(self.roles[b][p] for p in keep),),
            grids=tuple(replace(g, row=0, positions=tuple(keep.index(p) for p in g.positions)) for g in self.grids),
        )

    def _per_token(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape[:2] == self.ids.shape

    def take(self, rows: Sequence[int]) -> Inputs:
        """The rows of these numbers, in this order, as often as they are named; padding stays as it is.

        Raises:
            InputError: image tensors, which cannot be split by row, unless the rows are what there is.
        """
        if list(rows) == list(range(len(self))):
            return self
        if any(not self._per_token(v) for v in self.extra.values()):
            raise InputError(f"rows {list(rows)} of a batch with images", "image tensors cannot be split by row")
        at = list(rows)
        return replace(
            self,
            ids=self.ids[at],
            mask=self.mask[at],
            tokens=tuple(self.tokens[b] for b in at),
            roles=tuple(self.roles[b] for b in at),
            extra={k: v[at] for k, v in self.extra.items()},
            grids=(),
        )

    def repeat(self, n: int) -> Inputs:
        """One row repeated ``n`` times, its images with it: processors put those of all rows one after another."""
        if len(self) != 1:
            raise InputError(f"repeat {n} times", f"{len(self)} rows", "give one row")
        return replace(
            self,
            ids=self.ids.repeat(n, 1),
            mask=self.mask.repeat(n, 1),
            tokens=self.tokens * n,
            roles=self.roles * n,
            extra={name: self._repeated(value, n) for name, value in self.extra.items()},
            grids=tuple(
                replace(grid, row=b, image=grid.image + b * len(self.images)) for b in range(n) for grid in self.grids
            ),
            images=self.images * n,
        )

    def _repeated(self, value: Any, n: int) -> Any:
        if isinstance(value, list):
            return value * n
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if value.ndim == 3 and value.shape[1:] == self.ids.shape:  # positions along several axes: [axis, row, pos]
            return value.repeat(1, n, 1)
        return value.repeat(n, *[1] * (value.ndim - 1))

    def extend(self, ids: Sequence[int], tokens: Sequence[str] = ()) -> Inputs:
        """Every row with ``ids`` appended as text. Rows must not be padded on the right, and carry no images."""
        if any(row[-1] != self.ids.shape[1] - 1 for row in self.real):
            raise InputError("append an answer", "rows are padded on the right", "pad on the left: padding_side='left'")
        extra = dict(self.extra)
        if "position_ids" in extra:
            follow = extra["position_ids"][:, -1:] + torch.arange(1, len(ids) + 1, device=self.ids.device)
            extra["position_ids"] = torch.cat([extra["position_ids"], follow], dim=1)
        if unknown := sorted(k for k, v in self.extra.items() if self._per_token(v) and k != "position_ids"):
            found = f"these inputs carry {', '.join(unknown)} per position"
            raise InputError("append an answer", found, "write the answer's first tokens into the prompt")
        words = tuple(tokens) or tuple(f"#{i}" for i in ids)
        more = torch.tensor(ids, dtype=self.ids.dtype, device=self.ids.device).expand(len(self), -1)
        return replace(
            self,
            ids=torch.cat([self.ids, more], dim=1),
            mask=torch.cat([self.mask, torch.ones_like(more, dtype=self.mask.dtype)], dim=1),
            tokens=tuple(row + words for row in self.tokens),
            roles=tuple(row + ("text",) * len(words) for row in self.roles),
            extra=extra,
        )

    def kwargs(self, device: torch.device) -> dict[str, Any]:
        """What the model's forward is called with, on ``device``."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.extra.items()}
        own = {f"{self.side}input_ids": self.ids.to(device)}
        if not self.side or self.padded:  # not every decoder takes a mask
            own[f"{self.side}attention_mask"] = self.mask.to(device)
        return {**own, **moved}

    @property
    def digest(self) -> str:
        """Short hash of everything the model reads."""
        return _hash({"ids": self.ids, "mask": self.mask, **self.extra})

    @property
    def row_digests(self) -> list[str]:
        """Short hash of what the model reads of each row, padding aside; images of several rows count as a whole."""
        whole = {} if len(self) == 1 else {k: v for k, v in self.extra.items() if not self._per_token(v)}
        text = replace(self, extra={k: v for k, v in self.extra.items() if k not in whole}, grids=())
        rows = [text.row(b) for b in range(len(self))]
        images = _hash(whole)
        return [
            _hash({"ids": row.ids, **{k: v for k, v in row.extra.items() if not _counts(k, v)}}) + images
            for row in rows
        ]


def _counts(name: str, value: Any) -> bool:
    """Whether an input says no more than that tokens follow each other, as is said beside padding on the left."""
    return name == "position_ids" and torch.equal(value.flatten().long().cpu(), torch.arange(value.numel()))


def _hash(values: Mapping[str, Any]) -> str:
    h = hashlib.sha256()
    for name, value in sorted(values.items()):
        h.update(name.encode())
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            h.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            h.update(plain.flatten().view(torch.uint8).numpy().tobytes())
        else:
            h.update(repr(value).encode())
    return h.hexdigest()[:16]


def require_same_length(clean: Inputs, corrupt: Inputs, first: int = 0) -> None:
    """MismatchError naming the row (counted from ``first``) and the tokens where two inputs do not line up."""
    for b, (n, m) in enumerate(zip(clean.lengths, corrupt.lengths, strict=False)):
        if n != m:
            a = [clean.tokens[b][p] for p in clean.real[b]]
            c = [corrupt.tokens[b][p] for p in corrupt.real[b]]
            at = next((i for i, (x, y) in enumerate(zip(a, c, strict=False)) if x != y), min(n, m))
            raise MismatchError(
                "clean and corrupt prompts of equal token length",
                f"row {first + b} has {n} and {m} tokens, first different at position {at}: "
                f"{a[at : at + 4]} against {c[at : at + 4]}",
                "choose words that split into as many tokens",
            )
    if len(clean) != len(corrupt):
        raise MismatchError("clean and corrupt prompts", f"{len(clean)} and {len(corrupt)} rows", "give equal numbers")


def require_difference(clean: Inputs, corrupt: Inputs, first: int = 0) -> None:
    """MismatchError naming a row (counted from ``first``) that is one and the same in both.

    Nothing of one run would change the other; among other pairs it would move their mean, or make it look surer than
    it is.
    """
    for b, (one, other) in enumerate(zip(clean.row_digests, corrupt.row_digests, strict=True)):
        if one == other:
            text = "".join(clean.tokens[b][p] for p in clean.real[b]).strip()
            hint = "let them differ in what the answer hangs on"
            raise MismatchError(
                "clean and corrupt prompts", f"they are the same in row {first + b}: {text[:60]!r}", hint
            )
