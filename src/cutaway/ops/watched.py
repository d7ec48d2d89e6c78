"""What the maths here asks of a model; ``cutaway.models.handle.Model`` is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cutaway.core.inputs import Inputs
from cutaway.core.trace import Trace


class Step(Protocol):
    """One step from the last residual stream to the logits."""

    @property
    def module(self) -> str: ...
    @property
    def call(self) -> Any: ...
    @property
    def slot(self) -> int: ...
    def run(self, root: nn.Module, x: Tensor) -> Tensor:
        """The step applied to ``x``."""
        ...


class WatchedModel(Protocol):
    """A model that can be traced, intervened in, and asked for its structure."""

    hf: nn.Module

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def layers(self) -> Sequence[Any]: ...
    @property
    def encoder(self) -> Any:
        """What knows the vocabulary and the configuration."""
        ...

    def inputs(self, prompt: Any, image: Any = None) -> Inputs:
        """Inputs of a text, ids or several of them."""
        ...

    def anatomy(self, inputs: Any = None) -> Any:
        """The structure: ``stacks``, ``tail``, ``refused``."""
        ...

    def expand(self, sites: Any, inputs: Inputs | None = None) -> Any:
        """The concrete sites that ``sites`` name."""
        ...

    def trace(self, inputs: Any, want: Any = (), do: Any = (), grad: Any = False, *, stop: bool = False) -> Trace:
        """One watched forward pass."""
        ...

    def until_attention(self, layer: int, args: Any, kwargs: Any, x: Tensor) -> dict[str, Tensor]:
        """{"q", "k", "v"}: [row, pos, head, d] what a layer, called so, would attend with if ``x`` entered it."""
        ...

    def behind_attention(self, layer: int, args: Any, kwargs: Any, x: Tensor, z: Tensor) -> Tensor:
        """[row, pos, head, d_value] what that layer's output matrix would read if its heads gave ``z``."""
        ...

    def unembed(self, resid: Tensor) -> Tensor:
        """Logits of residual states."""
        ...

    def decode(self, token: int) -> str:
        """The string of a token id."""
        ...


def rounding(dtype: torch.dtype) -> float:
    """Relative error that sums of this dtype may differ by when they are taken in another order."""
    return max(1e-4, 4 * torch.finfo(dtype).eps)
