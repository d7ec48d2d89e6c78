"""Low-rank adapters (LoRA, DoRA) as the peft library saves them, merged into the weights of the model they are for.

``base+adapter`` names one, as in ``town+./tuned``; a folder that holds an adapter alone names its base itself. Merged,
it is a model like any other: its neurons and heads are those of the tuned model, and nothing runs beside them.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cutaway.core.errors import LoadError, UnsupportedError, WeightsError, nearest
from cutaway.models.source import ADAPTER, ADAPTER_WEIGHTS, Source, require_whole, settings_in, specimen_or_folder

PREFIX = "base_model.model."
TRUE_START = (True, False, "gaussian", "orthogonal", "eva")
"""Ways of starting the low-rank matrices that leave the base model's weights as they were."""
WHOLE = "merge it with peft and save the whole model"
CHANGES = {"use_qalora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config", "lora_bias", "arrow_config"}
CHANGES |= {"target_parameters", "trainable_token_indices", "layer_replication", "alora_invocation_tokens"}
"""Settings of the library under which an adapter is more than low-rank changes of matrices."""
_PART = re.compile(r"^(?P<path>.+)\.(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(\.weight)?$")


def taken_apart(ref: str | Path) -> tuple[str | Path, list[str]]:
    """(the base, the adapters in the order they are merged) of ``base+adapter+...``; a folder's name may hold a "+"."""
    text = str(ref)
    if isinstance(ref, Path) or "+" not in text or specimen_or_folder(text):
        return ref, []
    base, *adapters = text.split("+")
    if not base or not all(adapters):
        found = "one side of a '+' is empty"
        raise LoadError(f"model '{text}'", found, "write base+adapter, as 'town+./tuned'")
    return base, adapters


@dataclass(frozen=True)
class Adapter:
    """Low-rank changes of some weights, and weights that are replaced whole.

    Attributes:
        name: what it was asked by. base: the model that it says it is for; "" when it does not say.
        config: its settings. tensors: what its file holds, without the library's prefix.
    """

    name: str
    base: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @staticmethod
    def read(source: Source) -> Adapter:
        """The adapter in a folder.

        Raises:
            LoadError: no adapter there. WeightsError: its weights are missing, pickled or damaged.
            UnsupportedError: another kind of adapter, or one that does more than change weights.
        """
        from safetensors.torch import load_file

        asked, file = f"adapter '{source.name}'", source.folder / ADAPTER
        if not file.is_file():
            raise LoadError(asked, f"the folder has no {ADAPTER}", "give a folder that peft's save_pretrained wrote")
        config = settings_in(file, asked)
        _require_known(asked, config)
        weights = source.folder / ADAPTER_WEIGHTS
        if not weights.is_file():
            pickled = (
                " and only a pickle, which can run code" if (source.folder / "adapter_model.bin").is_file() else ""
            )
            found = f"the folder has no {ADAPTER_WEIGHTS}{pickled}"
            raise WeightsError(asked, found, "save the adapter again with save_pretrained, which writes safetensors")
        require_whole(weights, asked)
        tensors = {name.removeprefix(PREFIX).replace(".base_layer.", "."): x for name, x in load_file(weights).items()}
        if not tensors:
            raise WeightsError(asked, f"{ADAPTER_WEIGHTS} holds nothing", "save the adapter again")
        return Adapter(source.name, str(config.get("base_model_name_or_path") or ""), config, tensors)

    def merge(self, hf: nn.Module, base: str) -> None:
        """Change the weights of ``hf`` in place, in float32 before they are rounded to their own type.

        Raises:
            WeightsError: a module that the model lacks, a shape that does not fit, or numbers that are not finite.
            UnsupportedError: a weight that two modules share, is quantised, or is no matrix.
        """
        model = _Weights(self, base, hf)
        low: dict[str, dict[str, Tensor]] = {}
        whole: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            if not bool(tensor.isfinite().all()):
                raise WeightsError(f"adapter '{self.name}'", f"{name} holds NaN or infinite values", "train it again")
            if found := _PART.match(name):
                low.setdefault(found["path"], {})[found["part"]] = tensor
            else:
                whole[name] = tensor
        for name, tensor in whole.items():
            path, _, leaf = name.rpartition(".")
            weight = model.weight(path, leaf)
            self._require_shape(name, tensor.shape, weight.shape)
            with torch.no_grad():
                weight.copy_(tensor)
        for path, parts in low.items():
            self._merge_low(model, path, parts)

    def _merge_low(self, model: _Weights, path: str, parts: Mapping[str, Tensor]) -> None:
        weight = model.weight(path, "weight")
        a, b = (parts.get(f"lora_{x}", parts.get(f"lora_embedding_{x}")) for x in "AB")
        if a is None or b is None:
            missing = "A" if a is None else "B"
            raise WeightsError(f"adapter '{self.name}'", f"{path} has no lora_{missing}", "save the adapter again")
        if weight.ndim != 2 or a.ndim != 2 or b.ndim != 2:
            found = f"{path} has a weight of {weight.ndim} axes and low-rank parts of {a.ndim} and {b.ndim}"
            raise UnsupportedError(f"adapter '{self.name}'", found, "matrices are merged, nothing else")
        looked_up = "lora_embedding_A" in parts
        if looked_up and "lora_magnitude_vector" in parts:
            raise UnsupportedError(f"adapter '{self.name}'", f"{path} is an embedding under DoRA", WHOLE)
        turned = looked_up or _reads_rows(model.modules[path])
        with torch.no_grad():
            change = b.float() @ a.float() * self._scaling(path, a.shape[0])
            change = (change.T if turned else change).to(weight.device)
            self._require_shape(path, change.shape, weight.shape)
            new = weight.float() + change
            if (magnitude := parts.get("lora_magnitude_vector")) is not None:
                axis = 0 if turned else 1  # the norm is over what each output reads
                norm = new.norm(dim=axis, keepdim=True)
                new = new * (magnitude.to(weight.device).float().view_as(norm) / norm)
            weight.copy_(new)

    def _scaling(self, path: str, rank: int) -> float:
        alpha = float(_pattern(self.config.get("alpha_pattern"), path, self.config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _require_shape(self, name: str, ours: torch.Size, theirs: torch.Size) -> None:
        if ours != theirs:
            found = f"{name} is {list(ours)} there and {list(theirs)} in the model"
            raise WeightsError(f"adapter '{self.name}'", found, f"it was made for {self.base or 'another model'}")


class _Weights:
    """The weights of a model that an adapter is merged into, by module; found out once for all of them."""

    def __init__(self, adapter: Adapter, base: str, hf: nn.Module) -> None:
        self.adapter, self.base = adapter, base
        self.modules = dict(hf.named_modules())
        self._owners: dict[int, list[str]] = defaultdict(list)
        for name, module in self.modules.items():
            for weight in module.parameters(recurse=False):
                self._owners[id(weight)].append(name)

    def weight(self, path: str, leaf: str) -> Tensor:
        """The weight of one module alone, as floats."""
        asked, theirs = f"adapter '{self.adapter.name}'", self.adapter.base
        weight = getattr(self.modules.get(path), leaf, None)
        if not isinstance(weight, Tensor):
            kind = f"weight {path}.{leaf}" if path in self.modules else f"module {path}"
            made = f"it was made for {theirs}" if theirs and theirs != self.base else ""
            raise WeightsError(asked, f"{self.base} has no {kind}", nearest(path, self.modules) or made)
        if not weight.is_floating_point():
            found = f"{path} of {self.base} is quantised ({weight.dtype})"
            raise UnsupportedError(asked, found, "load it in bfloat16")
        if len(owners := self._owners[id(weight)]) > 1:
            found = f"{' and '.join(owners)} of {self.base} share one weight, and changing one would change both"
            raise UnsupportedError(asked, found, "merge it with peft into a model saved with tie_word_embeddings=false")
        return weight


def _reads_rows(module: nn.Module) -> bool:
    """Whether a module's weight is [in, out], as GPT-2's, and not [out, in]."""
    return type(module).__name__ == "Conv1D"


def _pattern(patterns: Any, path: str, otherwise: Any) -> Any:
    """The value of the pattern that the end of a path fits, as the library matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return otherwise


def _require_known(asked: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(asked, f"its kind is {kind!r}", "low-rank adapters (LORA) are merged, no other kind")
    start = config.get("init_lora_weights", True)
    if start not in TRUE_START:
        found = f"it was started with {start!r}, which changed the base model's own weights"
        raise UnsupportedError(asked, found, WHOLE)
    for option in sorted(CHANGES):
        if config.get(option):
            raise UnsupportedError(asked, f"it has {option}={config[option]!r}", WHOLE)
