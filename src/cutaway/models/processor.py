"""The tokenizer or processor of a folder: the same ids and pixels with and without torchvision."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from cutaway.core.errors import CutawayError, LoadError, UnsupportedError
from cutaway.models.upstream import reason

TOKENIZER = (
    "tokenizer*.json",
    "tokenizer*.model",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*",
    "*.tiktoken",
    "tekken.json",
)
PROCESSOR, IMAGES, VIDEOS = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"
VISION_PARTS = ("vision", "vq", "image")  # in the names of sub-configurations


def has_images(config: Any) -> bool:
    """Whether a configuration is of an image-text-to-text class, and with its vision part there."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return False
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return True
    parts = [name for name in config.sub_configs if any(part in name for part in VISION_PARTS)]
    return not parts or any(getattr(config, name, None) is not None for name in parts)


def load_processor(folder: Path, config: Any, name: str = "") -> Any:
    """The processor of a folder, its tokenizer alone for a text model, None when it has no tokenizer files.

    Images go through Pillow, so that pixels do not depend on whether torchvision is installed.

    Raises:
        LoadError: the files are there and cannot be used.
    """
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER):
        return None
    cls = _class(folder, config) if has_images(config) and _has(folder, PROCESSOR, IMAGES) else None
    what = "tokenizer" if cls is None else cls.__name__
    try:
        return _tokenizer(folder) if cls is None else _processor(cls, folder)
    except CutawayError:
        raise
    except ImportError as error:
        raise LoadError(f"{what} of '{name}'", reason(error), "install that package") from error
    except Exception as error:
        hint = "get its files again; without them, the model is loaded without a processor and takes token ids"
        raise LoadError(f"{what} of '{name}'", f"{type(error).__name__}: {reason(error)}", hint) from error


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _processor(cls: Any, folder: Path) -> Any:
    from transformers import AutoImageProcessor
    from transformers.utils import is_torchvision_available

    if "video_processor" in cls.get_attributes() and not is_torchvision_available():
        cls = without_video(cls)
    processor = cls.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if getattr(processor.image_processor, "backend", "pil") != "pil":
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    return processor


def _class(folder: Path, config: Any) -> Any:
    """The processor class that the folder's files name, else the one of the architecture; None when there is none."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    named = (_read(folder / file).get("processor_class") for file in (PROCESSOR, IMAGES, "tokenizer_config.json"))
    name = next(filter(None, named), None) or PROCESSOR_MAPPING_NAMES.get(config.model_type)
    cls = getattr(transformers, name, None) if name else None
    if name and cls is None:
        raise LoadError(f"processor of '{folder.name}'", f"transformers {transformers.__version__} has no {name}", "")
    return with_pillow(name, cls) if getattr(cls, "is_dummy", False) else cls


def with_pillow(name: str, dummy: Any) -> Any:
    """A processor class that transformers hides only because its image processor has a torchvision module.

    Its module is imported with the Pillow twin of that module in the other's place.
    """
    package, _, family = dummy.__module__.rpartition(".processing_")
    hidden, twin = f"{package}.image_processing_{family}", f"{package}.image_processing_pil_{family}"
    sys.modules[hidden] = import_module(twin)
    try:
        return getattr(import_module(dummy.__module__), name)
    finally:
        del sys.modules[hidden]


class NoVideo(dict[str, Any]):
    """The settings of a video processor that cannot be made without torchvision; it takes no video.

    Settings are attributes too (None where the folder does not give one), because processors read some of them.
    """

    model_input_names: tuple[str, ...] = ()
    _auto_class = None

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: Any) -> NoVideo:
        """The settings in ``folder``, wherever this version of transformers or an earlier one wrote them."""
        nested = _read(Path(folder) / PROCESSOR).get("video_processor")
        return cls(nested or _read(Path(folder) / VIDEOS) or _read(Path(folder) / IMAGES))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.get(name)

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedError("a video", "the package torchvision is not installed", "give images, or install it")


def without_video(cls: Any) -> Any:
    """A processor class with ``NoVideo`` where its video processor would be; the rest is as it was."""

    class Still(cls):  # type: ignore[misc]
        video_processor_class = NoVideo.__name__

        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return NoVideo if isinstance(argument, NoVideo) else super().check_argument_for_proper_class(name, argument)

        @staticmethod
        def get_possibly_dynamic_module(name: str) -> Any:
            return NoVideo if name == NoVideo.__name__ else cls.get_possibly_dynamic_module(name)

    Still.__name__ = Still.__qualname__ = cls.__name__  # save_pretrained writes it
    return Still


def _has(folder: Path, *files: str) -> bool:
    return any((folder / file).is_file() for file in files)


def _read(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoadError(f"processor of '{file.parent.name}'", f"{file.name} cannot be read ({error})") from error
