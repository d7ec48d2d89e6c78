"""The catalog: finds the methods, runs them by name, and makes saved results again.

A method is a function of its own name in ``methods/<stage>/<name>.py`` under ``@method``: lying there registers it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cutaway.core.errors import LoadError, MethodError, ResultError, UnknownMethodError, nearest
from cutaway.core.method import STAGES, Method

if TYPE_CHECKING:
    from cutaway.core.result import Difference, Result
    from cutaway.models.handle import Model

PACKAGE = "cutaway.methods"
COMPOSED = {"explain": "cutaway.explain", "aggregate": "cutaway.aggregation"}
"""Functions under ``@method`` that are made of methods: where each lies. They have no stage."""


class Headline(NamedTuple):
    """A method as its source shows it, before anything is imported."""

    name: str
    stage: str
    summary: str
    module: str


def headlines() -> dict[str, Headline]:
    """Every method by name, in the order of the stages; reads the sources and imports none of them."""
    return _headlines(PACKAGE)


def composed() -> dict[str, Headline]:
    """What is made of several methods, by name; as ``headlines``, without importing it."""
    return {name: _composed(name, module) for name, module in COMPOSED.items()}


def methods() -> dict[str, Method]:
    """Every method's record by name, in the order of the stages."""
    return {name: get(name) for name in headlines()}


def get(name: str) -> Method:
    """The record of the method of that name.

    Raises:
        UnknownMethodError: there is none; names the nearest.
    """
    known = {**composed(), **headlines()}
    if name not in known:
        hint = nearest(name, known) or "'cutaway methods' lists them"
        raise UnknownMethodError(f"method {name!r}", f"there is none of that name among {len(known)}", hint)
    function = getattr(importlib.import_module(known[name].module), name)
    record: Method = function.method
    return record


def run(name: str, model: Model, **params: Any) -> Result:
    """What the method makes of the model; parameters as text or as values, as in the method's signature.

    Raises:
        UnknownMethodError: no such method. ParameterError: a parameter is unknown, missing or of the wrong kind.
    """
    return get(name).run(model, **params)


@dataclass(frozen=True)
class Rerun:
    """A result made again.

    Attributes:
        saved: what was there before.
        result: what came out now.
        difference: where they differ; falsy when equal within the tolerances.
        notes: what else changed between the two runs (versions, device, files that were read).
    """

    saved: Result
    result: Result
    difference: Difference
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether the numbers agree within the tolerances."""
        return not self.difference

    def __str__(self) -> str:
        verdict = "equal" if self.equal else "different: " + "; ".join(self.difference.lines)
        return verdict + "".join(f" (note: {note})" for note in self.notes)


def rerun(saved: str | Path | Result, model: Model | None = None, rtol: float = 1e-5, atol: float = 1e-6) -> Rerun:
    """Runs again what a result says it came from, and compares.

    Args:
        saved: the folder where the result was saved, or the result itself.
        model: the model, when it was made in memory; else the one that the result names is loaded.
        rtol: largest relative difference that counts as equal.
        atol: largest absolute difference that counts as equal.

    Raises:
        ResultError: the folder holds no result, or the result does not say how it was made, or the model is another.
        LoadError: the model that it names cannot be loaded.
        ParameterError: a parameter was made in memory and never saved, or ``model`` is none.
    """
    from cutaway.core.result import Result
    from cutaway.results import open_result

    asked = f"rerunning {saved.title if isinstance(saved, Result) else str(saved)!r}"
    saved = saved if isinstance(saved, Result) else open_result(saved)
    made = saved.made_by
    if made is None:
        raise ResultError(asked, "the result does not say how it was made", "only results of methods can be rerun")
    record = get(made.method)
    model = _loaded(made.model, made.dtype, asked) if model is None else model
    record.check_model(model)
    if model.digest != made.model_digest:
        found = f"model {model.name!r} has weights {model.digest}, the result came from {made.model_digest}"
        raise ResultError(asked, found, "give the model it was made with")
    result = record.run(model, **made.params)
    return Rerun(saved, result, saved.same_as(result, rtol=rtol, atol=atol), tuple(_changes(saved, result)))


def _loaded(name: str, dtype: str, asked: str) -> Model:
    from cutaway.models.load import load

    try:
        return load(name, dtype=dtype)
    except LoadError as error:
        found = f"its model {name!r} cannot be loaded ({error.found})"
        raise LoadError(asked, found, "a model made in memory has to be given again") from error


def _changes(saved: Result, result: Result) -> list[str]:
    """What differs in how two results were made, other than the time."""
    then, now = saved.made_by, result.made_by
    if then is None or now is None:
        return []
    notes = []
    if then.inputs_digest != now.inputs_digest:
        notes.append("an image or result that it reads has changed since")
    for name in ("device", "dtype"):
        if getattr(then, name) != getattr(now, name):
            notes.append(f"{name} {getattr(then, name)} then, {getattr(now, name)} now")
    for name in sorted(then.versions.keys() | now.versions.keys()):
        if then.versions.get(name) != now.versions.get(name):
            notes.append(f"{name} {then.versions.get(name)} then, {now.versions.get(name)} now")
    return notes


@cache
def _headlines(package: str) -> dict[str, Headline]:
    spec = importlib.util.find_spec(package)
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    found: dict[str, Headline] = {}
    for stage in STAGES:
        files = [
            path
            for folder in folders
            for path in (*folder.glob(f"{stage}/*.py"), *folder.glob(f"{stage}/*/__init__.py"))
        ]
        for path in sorted(files):
            name = path.parent.name if path.name == "__init__.py" and path.parent.name != stage else path.stem
            if name.startswith("_"):
                continue
            summary = _summary_of(path, name)
            if summary is None:
                continue
            if name in found:
                clash = f"{found[name].module} and {package}.{stage}.{name}"
                raise MethodError(f"method {name!r}", f"two have this name: {clash}", "rename one")
            found[name] = Headline(name, stage, summary, f"{package}.{stage}.{name}")
    return found


@cache
def _composed(name: str, module: str) -> Headline:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise MethodError(f"method {name!r}", f"there is no module {module}")
    return Headline(name, "", _summary_of(Path(spec.origin), name) or "", module)


def _summary_of(path: Path, name: str) -> str | None:
    """First line of the docstring of the method ``name`` in a source file; None when it holds no such method."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            calls = [each.func if isinstance(each, ast.Call) else each for each in node.decorator_list]
            if any(isinstance(call, ast.Name) and call.id == "method" for call in calls):
                return (ast.get_docstring(node) or "").split("\n")[0]
    return None
