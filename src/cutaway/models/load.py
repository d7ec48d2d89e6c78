"""load: a Model from a specimen, a folder or the hub, with every way this can fail said in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cutaway.core.errors import LoadError, UnsupportedError, WeightsError, nearest
from cutaway.models.adapters import Adapter, taken_apart
from cutaway.models.handle import Model
from cutaway.models.processor import has_images, load_processor
from cutaway.models.source import ADAPTER, CONFIG, Source, locate, settings_in, weight_files
from cutaway.models.upstream import explained, quiet

SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # layouts over several devices, which accelerate makes


def load(
    ref: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_pickle: bool = False,
    attn_implementation: str | None = None,
) -> Model:
    """A Model in eval mode, with its tokenizer or processor where the folder has one.

    Args:
        ref: a specimen's name, a folder that save_pretrained wrote, or a hub id, ``org/name`` or ``org/name@revision``;
            ``base+adapter`` merges a low-rank adapter (LoRA, DoRA) that peft saved, and an adapter alone its own base.
        dtype: of the weights: "float32", "bf16", ...; as they were saved when None or "auto".
        device: "cpu", "cuda:1", ...; "auto" spreads the layers over what there is (needs accelerate).
        revision: branch, tag or commit of a hub id.
        trust_pickle: open pickle weights (pytorch_model*.bin) too, with torch's weights-only reader.
        attn_implementation: as transformers names them ("eager", "sdpa", ...).

    Raises:
        LoadError: nothing there, no access, no network, an unknown dtype, revision or device, a broken tokenizer.
        WeightsError: no weights, untrusted pickle, damaged files, weights missing or of the wrong shape.
        UnsupportedError: an architecture that the installed transformers lacks or that needs code from the folder.
    """
    precision, place, spread = _dtype(dtype), _device(device), _spread(device)
    with quiet():
        source, adapters = _with_adapters(ref, revision, trust_pickle)
        settings = _settings(source)
        pickled = weight_files(source, trust_pickle)[0].suffix == ".bin"
        options = {
            "dtype": precision,
            "use_safetensors": not pickled,
            "device_map": spread,
            "attn_implementation": attn_implementation,
        }
        asked = f"model '{source.name}'"
        if attn_implementation is not None:
            asked += f" with attn_implementation={attn_implementation!r}"
        with explained(asked):
            config = _config(source, settings)
            hf = _module(source, config, options)
            processor = load_processor(source.folder, config, source.name)
        for adapter in adapters:
            adapter.merge(hf, source.name)
        name = "+".join([source.name, *(adapter.name for adapter in adapters)])
        return Model(hf if place is None else _moved(hf, place), processor, name=name)


# -- what is asked -----------------------------------------------------------------------------------------------------
def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    if dtype is None or dtype == "auto":
        return "auto"
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, SHORT.get(dtype, dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        known = ("float32", "bfloat16", "float16", "float64", "auto", *SHORT)
        hint = nearest(str(dtype), known) or f"write one of {', '.join(known[:5])}"
        raise LoadError(f"dtype={dtype!r}", "it is no floating-point type", hint)
    return found


def _spread(device: str | torch.device | None) -> str | None:
    if not isinstance(device, str) or device not in SPREAD:
        return None
    if util.find_spec("accelerate") is None:
        raise LoadError(
            f"device={device!r}",
            "the package accelerate is not installed",
            "pip install accelerate, or name one device",
        )
    return device


def _device(device: str | torch.device | None) -> torch.device | None:
    if device is None or (isinstance(device, str) and device in SPREAD):
        return None
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LoadError(
            f"device={str(device)!r}", f"this machine has {', '.join(_devices())}", "name one of them"
        ) from error
    return place


def _devices() -> list[str]:
    accelerated = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu", *(f"{accelerated.type}:{i}" for i in range(torch.accelerator.device_count()) if accelerated)]


def _moved(hf: nn.Module, place: torch.device) -> nn.Module:
    try:
        return hf.to(place)
    except torch.OutOfMemoryError as error:
        size = sum(p.numel() * p.element_size() for p in hf.parameters()) / 2**30
        raise LoadError(
            f"device='{place}'", f"the weights' {size:.1f} GiB do not fit", "ask for dtype='bfloat16'"
        ) from error


# -- what is found -----------------------------------------------------------------------------------------------------
def _with_adapters(ref: str | Path, revision: str | None, trust_pickle: bool) -> tuple[Source, list[Adapter]]:
    """Where the model is, and what is merged into it; an adapter alone is for the base that it names."""
    base, named = taken_apart(ref)
    source = locate(base, revision, trust_pickle)
    adapters = [Adapter.read(locate(name)) for name in named]
    if named or (source.folder / CONFIG).is_file() or not (source.folder / ADAPTER).is_file():
        return source, adapters
    alone = Adapter.read(source)
    asked, hint = f"model '{source.name}'", f"write BASE+{source.name}"
    if not alone.base:
        raise LoadError(asked, "the folder holds an adapter that does not name its base", hint)
    try:
        return locate(alone.base, None, trust_pickle), [alone]
    except LoadError as error:
        raise LoadError(asked, f"the folder holds an adapter of {alone.base}: {error.found}", hint) from error


def _settings(source: Source) -> Mapping[str, Any]:
    """config.json as it is written; its architecture must be one that the installed transformers has."""
    asked, file = f"model '{source.name}'", source.folder / CONFIG
    if not file.is_file():
        below = sorted(p.parent.name for p in source.folder.glob(f"*/{CONFIG}"))
        hint = (
            f"there is one in {', '.join(repr(b) for b in below[:3])}" if below else "give a folder of save_pretrained"
        )
        raise LoadError(asked, f"the folder has no {CONFIG}", hint)
    return settings_in(file, asked)


def _config(source: Source, settings: Mapping[str, Any]) -> Any:
    import transformers

    asked, kind = f"model '{source.name}'", settings.get("model_type")
    if kind is None:
        raise UnsupportedError(asked, f"{CONFIG} names no model_type", "give a folder of save_pretrained")
    if kind not in transformers.CONFIG_MAPPING:
        found = f"transformers {transformers.__version__} has no architecture {kind!r}"
        if "auto_map" in settings:
            raise UnsupportedError(asked, f"{found}; the folder brings code of its own", "code of a model is never run")
        written = settings.get("transformers_version", "")
        newer = f"a newer transformers (the folder was written by {written})" if written else "a newer transformers"
        raise UnsupportedError(asked, found, nearest(str(kind), transformers.CONFIG_MAPPING) or f"install {newer}")
    return transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)


def _module(source: Source, config: Any, options: Mapping[str, Any]) -> nn.Module:
    auto = _auto(config)
    if auto is None:
        found = f"a {config.model_type} is neither a causal language model nor an image-text-to-text model"
        raise UnsupportedError(f"model '{source.name}'", found, "cutaway reads those two kinds")
    hf, report = auto.from_pretrained(
        source.folder,
        config=config,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the report, with their names and shapes
        **{name: value for name, value in options.items() if value is not None},
    )
    _require_complete(source, config, hf, report)
    return hf.eval()


def _auto(config: Any) -> Any:
    """What opens a configuration: an auto class, or the class it was saved as; None when it is of another kind."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if has_images(config):
        return transformers.AutoModelForImageTextToText
    if type(config) in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    # The language model of a larger one, saved alone (Mllama, Emu 3): the auto classes know the larger one only.
    known = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    saved = next(iter(getattr(config, "architectures", None) or ()), "")
    cls = getattr(transformers, saved) if any(saved in names.values() for names in known) else None
    return cls if cls is not None and isinstance(config, cls.config_class) else None


def _require_complete(source: Source, config: Any, hf: nn.Module, report: Mapping[str, Any]) -> None:
    """Every weight came from the files; transformers itself draws missing ones at random and only warns."""
    asked, name = f"weights of '{source.name}'", type(hf).__name__
    missing, extra = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    saved = next(iter(getattr(config, "architectures", None) or ()), name)
    hint = f"the folder was saved as {saved}" if saved != name else "save the model again with save_pretrained"
    if report["mismatched_keys"]:
        wrong, got, want = sorted(report["mismatched_keys"])[0]
        more = len(report["mismatched_keys"]) - 1
        found = f"{wrong} is {list(got)} in the file and {list(want)} in {name}" + (
            f", and {more} more" if more else ""
        )
        raise WeightsError(asked, found, hint)
    if missing:
        found = f"{len(missing)} that {name} needs are missing: {_few(missing)}"
        raise WeightsError(asked, found + (f"; unexpected: {_few(extra)}" if extra else ""), hint)
    if extra:
        import warnings

        warnings.warn(f"{asked}: {len(extra)} are not used by {name}: {_few(extra)}", stacklevel=4)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
