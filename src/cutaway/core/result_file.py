"""Results on disk: a folder of ``result.json`` + ``arrays.safetensors``, or one JSON file. Never pickle."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from cutaway.core.errors import ResultError, nearest
from cutaway.core.proof import Check, Proof, Provenance
from cutaway.core.result import Result

SCHEMA = 1
JSON, ARRAYS = "result.json", "arrays.safetensors"
WHOLE = "explanation.json"  # a folder may hold one JSON text with all numbers in it instead
PAGE, TABLES = "report.html", "tables"  # what may lie beside it
OURS = (JSON, ARRAYS, WHOLE, PAGE, TABLES)
PREVIOUS = ".{}.previous"


def save(result: Result, folder: Path, overwrite: bool = False) -> Path:
    """Write the result: the folder appears whole or not at all; a replaced result stays until the new one is there.

    Raises:
        ResultError: the folder holds something else, or a result and ``overwrite`` is off, or the disk refuses.
    """
    blob = _arrays_to_bytes(result)
    head = document(result) | {"arrays_sha256": hashlib.sha256(blob).hexdigest()}
    files = {ARRAYS: blob, JSON: json.dumps(head, indent=1, allow_nan=False).encode()}
    return put(files, folder, overwrite, f"saving a {result.kind} to {str(folder)!r}")


def put(files: Mapping[str, bytes], folder: Path, overwrite: bool, asked: str) -> Path:
    """Makes a folder of these files (a name may have one folder in it), whole or not at all; ``save`` says the rest."""
    folder = folder.absolute()
    fresh = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    previous = folder.parent / PREVIOUS.format(folder.name)
    try:
        _refuse_to_bury(folder, {name.partition("/")[0] for name in files}, overwrite, asked)
        fresh.mkdir(parents=True)
        try:
            for name, data in files.items():
                (fresh / name).parent.mkdir(exist_ok=True)
                _write_through(fresh / name, data)
            _swap_in(fresh, folder, previous)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise ResultError(asked, f"the disk refused ({error.strerror or error})", "choose another folder") from error
    shutil.rmtree(previous, ignore_errors=True)
    return folder


def _swap_in(fresh: Path, folder: Path, previous: Path) -> None:
    """``fresh`` takes the place of ``folder``; at every moment the old or the new result is whole on disk."""
    if not folder.exists():
        os.rename(fresh, folder)
        return
    shutil.rmtree(previous, ignore_errors=True)
    os.rename(folder, previous)
    try:
        os.rename(fresh, folder)
    except OSError:
        os.rename(previous, folder)
        raise


def _refuse_to_bury(folder: Path, ours: set[str], overwrite: bool, asked: str) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ResultError(asked, "a file of that name exists", "choose another name")
    held = sorted(each.name for each in folder.iterdir())
    others = [name for name in held if name not in ours]
    if others:
        raise ResultError(asked, f"the folder also holds {', '.join(others[:3])}", "choose an empty or a new folder")
    if held and not overwrite:
        raise ResultError(asked, "it holds a result", "pass overwrite=True to replace it")


def _write_through(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def document(result: Result, inline: bool = False) -> dict[str, Any]:
    """The result as JSON values; the numbers themselves only when ``inline``, strings always."""
    dims, arrays = result.dims(), {}
    for name, data in result.arrays().items():
        entry: dict[str, Any] = {"dims": list(dims[name]), "dtype": _dtype_name(data), "shape": list(data.shape)}
        if inline or data.dtype == object:
            entry["data"] = [_to_json(each) for each in data.ravel().tolist()]
        arrays[name] = entry
    proof = None
    if result.proof:
        proof = {spec.name: _to_json(getattr(result.proof, spec.name)) for spec in fields(Proof)}
    return {
        "cutaway_result": SCHEMA,
        "kind": result.kind,
        "fields": _to_json(result.plain_fields()),
        "labels": _to_json(result.labels),
        "arrays": arrays,
        "made_by": _to_json(asdict(result.made_by)) if result.made_by else None,
        "check": _to_json(asdict(result.check)) if result.check else None,
        "proof": proof,
        "notes": list(result.notes),
        **_held(result),
    }


def _held(result: Result) -> dict[str, Any]:
    """Results that the result is made of, whole; nothing for most kinds."""
    held = result.held()
    whole = {
        field: {name: document(part, inline=True) for name, part in parts.items()} for field, parts in held.items()
    }
    return {"results": whole} if held else {}


def to_json(result: Result) -> str:
    """The whole result as one JSON text, numbers included; ``open_result`` reads it back exactly."""
    return json.dumps(document(result, inline=True), allow_nan=False)


def open_result(path: str | Path) -> Result:
    """The result saved in a folder, or in one ``.json`` file.

    Raises:
        ResultError: nothing there, not a result, damaged, written by a newer Cutaway, or of an unknown kind.
    """
    if not isinstance(path, str | os.PathLike):
        found = "it is a result already" if isinstance(path, Result) else "it names no folder"
        raise ResultError(f"opening a {type(path).__name__}", found, "give the folder that Result.save wrote")
    path = Path(path)
    asked = f"opening {str(path)!r}"
    if not path.exists():
        previous = path.parent / PREVIOUS.format(path.name)
        left = f"an interrupted save left the result in {str(previous)!r}; rename it"
        hint = left if previous.exists() else "give a folder that Result.save, or --out FOLDER, wrote"
        raise ResultError(asked, "there is no such folder or file", hint)
    source = next((path / name for name in (JSON, WHOLE) if (path / name).is_file()), path / JSON)
    source = source if path.is_dir() else path
    if not source.is_file():
        held = ", ".join(sorted(each.name for each in path.iterdir())[:3]) or "nothing"
        raise ResultError(asked, f"the folder holds {held} and no {JSON}", "give a folder that Result.save wrote")
    try:
        head = json.loads(source.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        raise ResultError(
            asked, f"{source.name} is damaged or not JSON (it is no text)", "give a folder that Result.save wrote"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(asked, f"{source.name} is damaged or not JSON ({error})") from None
    if not isinstance(head, dict) or not isinstance(head.get("cutaway_result"), int):
        hint = "'cutaway convert' reads circuits and graphs of others"
        raise ResultError(asked, f"{source.name} is not a Cutaway result", hint)
    if head["cutaway_result"] > SCHEMA:
        found = f"it has format {head['cutaway_result']}, this Cutaway reads up to {SCHEMA}"
        raise ResultError(asked, found, "upgrade Cutaway")
    kind = _kind_of(head, asked)
    blob = _read_arrays(path / ARRAYS, head, asked) if source.name == JSON and path.is_dir() else {}
    try:
        return _rebuild(kind, head, blob)
    except (KeyError, TypeError, ValueError, AttributeError, ResultError) as error:
        raise ResultError(asked, f"{source.name} is damaged ({type(error).__name__}: {error})") from None


def _kind_of(head: dict[str, Any], asked: str) -> type[Result]:
    kind = Result.kinds.get(str(head.get("kind")))
    if kind is None:
        known = sorted(Result.kinds)
        hint = nearest(str(head.get("kind")), known) or f"this Cutaway knows {', '.join(known)}"
        raise ResultError(asked, f"it is a result of kind {head.get('kind')!r}", hint)
    return kind


def _rebuild(kind: type[Result], head: dict[str, Any], blob: dict[str, np.ndarray]) -> Result:
    values = _from_json(head["fields"])
    column_fields = {spec.name for spec in fields(kind) if "columns" in spec.metadata}
    for name, entry in head["arrays"].items():
        data = _array_from(entry) if "data" in entry else blob[name]
        if list(data.shape) != entry["shape"] or _dtype_name(data) != entry["dtype"]:
            raise ValueError(f"{name} is {data.dtype}{list(data.shape)}, not {entry['dtype']}{entry['shape']}")
        data.flags.writeable = False
        field, _, column = name.partition("/")
        if field in column_fields:
            values.setdefault(field, {})[column] = data
        else:
            values[name] = data
    for field, parts in head.get("results", {}).items():
        values[field] = {name: _rebuild(_kind_of(part, name), part, {}) for name, part in parts.items()}
    evidence = {"made_by": Provenance, "check": Check, "proof": Proof}
    for name, make in evidence.items():
        values[name] = make(**_from_json(head[name])) if head[name] is not None else None
    return kind(labels=_from_json(head["labels"]), notes=tuple(head["notes"]), **values)


def _array_from(entry: dict[str, Any]) -> np.ndarray:
    dtype = object if entry["dtype"] == "str" else entry["dtype"]
    flat = [_from_json(each) for each in entry["data"]]
    return np.array(flat, dtype=dtype).reshape(entry["shape"])


def _dtype_name(data: np.ndarray) -> str:
    return "str" if data.dtype == object else data.dtype.name


def _arrays_to_bytes(result: Result) -> bytes:
    from safetensors.numpy import save

    return save({name: data for name, data in result.arrays().items() if data.dtype != object})


def _read_arrays(path: Path, head: dict[str, Any], asked: str) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if not path.is_file():
        raise ResultError(asked, f"{path.name} is missing", "copy the whole folder again")
    try:
        blob = path.read_bytes()
        if hashlib.sha256(blob).hexdigest() != head.get("arrays_sha256"):
            raise ResultError(asked, f"{path.name} is damaged: its checksum differs", "copy the whole folder again")
        return dict(load(blob))
    except (OSError, SafetensorError) as error:
        raise ResultError(asked, f"{path.name} cannot be read ({error})", "copy the whole folder again") from None


def _to_json(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become ``{"float": "nan"}``; everything else as it is."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, np.ndarray):
        return _to_json(value.tolist())
    if isinstance(value, list | tuple):
        return [_to_json(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _to_json(each) for key, each in value.items()}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"float"} and value["float"] in ("nan", "inf", "-inf"):
            return float(value["float"])
        return {key: _from_json(each) for key, each in value.items()}
    return tuple(_from_json(each) for each in value) if isinstance(value, list) else value
