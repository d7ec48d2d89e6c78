"""Where the files of a model are: a specimen, a local folder or a snapshot of the hub, always as one folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutaway.core.errors import LoadError, WeightsError, nearest
from cutaway.models.upstream import reason

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG, WEIGHTS, INDEX, PICKLES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
)
SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.bpe")  # everything that is no weight
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """A folder with a model in it, and the name that it was asked by."""

    folder: Path
    name: str


def locate(ref: str | Path, revision: str | None = None, trust_pickle: bool = False) -> Source:
    """The folder of a specimen, a local folder, or a hub id (``org/name`` or ``org/name@revision``), in this order.

    ``town@step-400`` is a checkpoint of a series that was trained here (``cutaway specimen train town``).
    Files of the hub are taken from its cache when they are there, or when offline mode is on.

    Raises:
        LoadError: none of these; no network and nothing cached; no access; no such revision.
    """
    from cutaway import specimens
    from cutaway.specimens.making.plans import trainable

    text = str(ref)
    name, _, at = text.partition("@")
    if name in specimens.names() or ((at or revision) and name in trainable()):
        if at and revision is not None and at != revision:
            raise LoadError(f"model '{text}'", f"revision={revision!r} says another revision", "give one of the two")
        return Source(specimens.path(name, at or revision), f"{name}@{at or revision}" if at or revision else name)
    path = Path(text).expanduser()
    if path.is_dir():
        _no_revision(text, revision, "a local folder")
        return Source(path, text)
    if path.exists():
        hint = f"give its folder: '{path.parent}'" if (path.parent / CONFIG).is_file() else "give a folder"
        raise LoadError(f"model '{text}'", "it is a file, and a model is a folder", hint)
    if isinstance(ref, Path) or _is_path(text):
        raise LoadError(f"model '{text}'", "there is no such folder", _near(path))
    return _from_hub(text, revision, trust_pickle)


def specimen_or_folder(text: str) -> bool:
    """Whether a reference, as it is, names a specimen or a folder that is here."""
    from cutaway import specimens

    return text in specimens.names() or Path(text).expanduser().is_dir()


def settings_in(file: Path, asked: str) -> Mapping[str, Any]:
    """What a JSON file of settings says.

    Raises:
        LoadError: it cannot be read, or holds something else than settings.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise LoadError(asked, f"{file.name} cannot be read ({error})", "get the file again") from error
    if not isinstance(value, dict):
        raise LoadError(asked, f"{file.name} holds a {type(value).__name__}, not settings", "get the file again")
    return value


def weight_files(source: Source, trust_pickle: bool) -> list[Path]:
    """The weight files of a folder, each checked to be whole.

    Raises:
        WeightsError: none, only pickle files that were not trusted, one that is missing or damaged.
    """
    asked, folder = f"weights of '{source.name}'", source.folder
    if (folder / INDEX).is_file():
        files = [folder / name for name in _shards(folder / INDEX, asked)]
    elif (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    else:
        return _pickles(source, trust_pickle)
    for file in files:
        if not file.is_file():
            raise WeightsError(asked, f"{INDEX} names {file.name}, which is not there", "get the folder again")
        require_whole(file, asked)
    return files


def _is_path(text: str) -> bool:
    return text.startswith(("/", ".", "~")) or "\\" in text or text.count("/") > 1


def _no_revision(text: str, revision: str | None, what: str) -> None:
    if revision is not None:
        raise LoadError(f"revision '{revision}' of '{text}'", f"{what} has no revisions", "leave the revision out")


def _near(path: Path) -> str:
    from cutaway import specimens

    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    if close := nearest(path.name, siblings):
        return close
    return f"the specimens are {', '.join(specimens.names())}"


def _from_hub(text: str, revision: str | None, trust_pickle: bool) -> Source:
    from cutaway import specimens

    name, _, at = text.partition("@")
    if at and revision is not None and at != revision:
        raise LoadError(f"model '{text}'", f"revision={revision!r} says another revision", "give one of the two")
    if not _HUB_ID.fullmatch(name):
        hint = f"the specimens are {', '.join(specimens.names())}"
        raise LoadError(f"model '{text}'", "it is neither a specimen, a folder, nor a hub id (org/name@revision)", hint)
    revision = revision or at or None
    folder = _snapshot(name, revision, SETTINGS)
    # The weights come from the commit that the settings came from.
    commit = folder.name if folder.parent.name == "snapshots" else revision
    if (folder / INDEX).is_file():
        _snapshot(name, commit, _shards(folder / INDEX, f"weights of '{text}'"))
    elif (folder / ADAPTER).is_file() and not (folder / CONFIG).is_file():
        _snapshot(name, commit, [ADAPTER_WEIGHTS])
    else:
        _snapshot(name, commit, [WEIGHTS])
        if trust_pickle and not (folder / WEIGHTS).is_file():
            _snapshot(name, commit, [PICKLES])
    return Source(folder, text if at else f"{name}@{revision}" if revision else name)


def _snapshot(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    asked = f"model '{name}'" + (f" at revision '{revision}'" if revision else "")
    offline = huggingface_hub.is_offline_mode()
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), local_files_only=offline
        )
    except errors.IncompleteSnapshotError as error:
        found = error.snapshot_path  # the cache of a run that did not need every file: what is missing is named later
    except errors.GatedRepoError as error:
        raise LoadError(asked, "the hub asks for access that was not granted", _ask(name)) from error
    except errors.RevisionNotFoundError as error:
        raise LoadError(asked, "the hub has the model, but not this revision", "leave the revision out") from error
    except errors.RepositoryNotFoundError as error:
        raise LoadError(asked, f"{_nowhere(name)}, and the hub shows none", _spelling(name)) from error
    except errors.LocalEntryNotFoundError as error:
        why = "offline mode is on (HF_HUB_OFFLINE)" if offline else "the hub cannot be reached"
        raise LoadError(asked, f"{_nowhere(name)}, {why}, and the hub's cache has none", _spelling(name)) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise LoadError(asked, f"the hub answered: {reason(error)}", "try again later, or load a folder") from error
    return Path(found)


def _nowhere(name: str) -> str:
    return "no folder here" if "/" in name else "no specimen, no folder here"


def _spelling(name: str) -> str:
    from cutaway import specimens

    if "/" in name:
        return "check the spelling; for a private model, log in with 'hf auth login'"
    return nearest(name, specimens.names()) or f"the specimens are {', '.join(specimens.names())}"


def _ask(name: str) -> str:
    return f"ask for it on the model's page ({name}), then log in with 'hf auth login'"


def _shards(index: Path, asked: str) -> list[str]:
    try:
        return sorted(
            {Path(name).name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        )
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        found = f"{index.name} is damaged ({type(error).__name__})"
        raise WeightsError(asked, found, "get the folder again") from error


def _pickles(source: Source, trust_pickle: bool) -> list[Path]:
    asked, folder = f"weights of '{source.name}'", source.folder
    pickles = sorted(folder.glob(PICKLES))
    if pickles and trust_pickle:
        return pickles
    if pickles:
        found = f"only pickle files ({pickles[0].name}), which can run code when they are opened"
        raise WeightsError(
            asked, found, "pass trust_pickle=True if you trust their author, or save them as safetensors"
        )
    others = [
        p.name for kind in ("safetensors", "gguf", "bin", "pt", "pth", "ckpt", "h5") for p in folder.glob(f"*.{kind}")
    ]
    found = f"no {WEIGHTS}" + (f", only {', '.join(sorted(others)[:3])}" if others else " and no other weight file")
    raise WeightsError(asked, found, "save the model with save_pretrained, which writes safetensors")


def require_whole(file: Path, asked: str) -> None:
    """A safetensors file can be opened.

    Raises:
        WeightsError: it is damaged or cut short.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            return
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        found = f"{file.name} ({size:,} bytes) is damaged or cut short ({reason(error)})"
        raise WeightsError(asked, found, "get the file again") from error
