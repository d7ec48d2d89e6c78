"""Methods: plain functions ``f(model, ...) -> Result`` whose signature is their schema.

``@method`` leaves the function what it is. Around it, a call checks the parameters, turns text forms into values,
measures the time, and stamps on the result what it takes to make it again.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import inspect
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, get_type_hints

from cutaway.core.errors import CutawayError, MethodError, ParameterError, UnsupportedError, nearest
from cutaway.core.forms.base import Form, ModelLike
from cutaway.core.params import form_of, without_none
from cutaway.core.proof import Provenance
from cutaway.core.result import Result
from cutaway.core.versions import versions

STAGES = ("see", "locate", "prove", "change", "follow")

P = ParamSpec("P")
R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        form: how it is written, and what the method receives for it.
        default: its value when it is not given, as ``form`` accepts it; None when it may be left out altogether.
        required: whether it must be given.
        help: what the docstring's ``Args`` says about it.
    """

    name: str
    form: Form
    default: Any
    required: bool
    help: str

    @property
    def default_text(self) -> str:
        """The default as text; '' when there is none."""
        return "" if self.default is None else self.form.text(self.default)

    def accept(self, given: Any, method: str) -> Any:
        """The value of what a caller gave; ParameterError when it is of the wrong kind."""
        if given is None and self.default is None and not self.required:
            return None
        with _told(self, given, method):
            return self.form.accept(given)

    def value(self, value: Any, model: ModelLike, method: str) -> Any:
        """What the method receives."""
        if value is None:
            return None
        with _told(self, value, method):
            return self.form.value(value, model)


class _told:
    """Makes a form's ``ValueError`` a ``ParameterError`` that names the parameter and what was given."""

    def __init__(self, parameter: Parameter, given: Any, method: str) -> None:
        self.parameter, self.given, self.method = parameter, given, method

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError) and not isinstance(error, CutawayError):
            shown = f" = {self.given!r}" if isinstance(self.given, str | int | float | bool) else ""
            asked = f"parameter {self.parameter.name!r}{shown} of {self.method}"
            raise ParameterError(asked, str(error), f"write {self.parameter.form.says}") from None


@dataclass(frozen=True)
class Method:
    """What is known about a method: all of it read from its function.

    Attributes:
        name: the function's name.
        stage: one of ``STAGES``, from the package it lies in; '' outside the catalog.
        summary: first line of the docstring.
        doc: the docstring.
        parameters: by name, in the order of the signature, the model left out.
        kind: the kind of result it returns.
        cites: keys of the works it follows.
        example: parameters, as text, that run on a small model.
        module: where it is defined.
        function: the function, undecorated.
    """

    name: str
    stage: str
    summary: str
    doc: str
    parameters: dict[str, Parameter]
    kind: type[Result]
    cites: tuple[str, ...]
    example: dict[str, str]
    module: str
    function: Callable[..., Result]
    model_type: Any

    @classmethod
    def of(cls, function: Callable[..., Result], cites: Sequence[str], example: Mapping[str, Any]) -> Method:
        """The record of a function; MethodError when its signature cannot serve as a schema."""
        asked = f"method {function.__name__!r} in {function.__module__}"
        try:
            hints = get_type_hints(function, include_extras=True)
        except NameError as error:
            raise MethodError(asked, f"its annotations need {error.name!r} at run time", "import it plainly") from None
        signature = list(inspect.signature(function).parameters.values())
        kind = hints.get("return")
        if not (isinstance(kind, type) and issubclass(kind, Result)):
            raise MethodError(asked, f"it returns {kind}", "annotate it with one kind of Result")
        if not signature:
            raise MethodError(asked, "it takes no model", "make the model its first parameter")
        doc = inspect.getdoc(function) or ""
        if not doc:
            raise MethodError(asked, "it has no docstring", "say in its first line what comes out")
        helps = args_section(doc)
        parameters = {}
        for each in signature[1:]:
            if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD, each.POSITIONAL_ONLY):
                raise MethodError(asked, f"{each} has no name to be given by", "name every parameter")
            if each.name not in hints:
                raise MethodError(asked, f"parameter {each.name!r} has no annotation", "give it its type")
            parameters[each.name] = _parameter(each, hints[each.name], helps.get(each.name, ""), asked)
        for name in (*helps, *example):
            if name not in parameters and name != signature[0].name:
                raise MethodError(asked, f"its docstring or example names {name!r}", "it has no such parameter")
        stages = [part for part in function.__module__.split(".") if part in STAGES]
        return cls(
            name=function.__name__,
            stage=stages[-1] if stages else "",
            summary=doc.splitlines()[0],
            doc=doc,
            parameters=parameters,
            kind=kind,
            cites=tuple(cites),
            example={
                name: parameters[name].form.text(parameters[name].accept(v, asked)) for name, v in example.items()
            },
            module=function.__module__,
            function=function,
            model_type=hints.get(signature[0].name),
        )

    def bind(self, args: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Values of all parameters, defaults filled in.

        Raises:
            ParameterError: one is unknown (with the nearest), missing, given twice or of the wrong kind.
        """
        asked = f"method {self.name!r}"
        names = list(self.parameters)
        if len(args) > len(names):
            raise ParameterError(asked, f"{len(args)} values were given", f"it takes {', '.join(names) or 'none'}")
        placed = dict(zip(names, args, strict=False))
        for name in given:
            if name in placed:
                raise ParameterError(f"parameter {name!r} of {self.name}", "it was given twice")
            if name not in self.parameters:
                known = f"it takes {', '.join(names)}" if names else "it takes none"
                raise ParameterError(asked, f"there is no parameter {name!r}", nearest(name, names) or known)
        found = {}
        for name, parameter in self.parameters.items():
            if name in placed or name in given:
                found[name] = parameter.accept(placed[name] if name in placed else given[name], self.name)
            elif parameter.required:
                hint = f"write {parameter.form.says}"
                raise ParameterError(f"parameter {name!r} of {self.name}", "it is required", hint)
            else:
                found[name] = parameter.default
        return found

    def check_model(self, model: object) -> None:
        """ParameterError when ``model`` is nothing that the method can be run on."""
        if isinstance(self.model_type, type) and not isinstance(model, self.model_type):
            found = f"a {type(model).__name__} was given as the model"
            raise ParameterError(f"method {self.name!r}", found, "give a model: cutaway.load(...) or Model(module)")

    def run(self, model: ModelLike, *args: Any, **given: Any) -> Result:
        """The method's result with its provenance.

        Raises:
            UnsupportedError: a model whose weights are spread over devices, where the method needs them together.
        """
        self.check_model(model)
        bound = self.bind(args, given)
        values = {name: self.parameters[name].value(value, model, self.name) for name, value in bound.items()}
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        started = time.perf_counter()
        try:
            result = self.function(model, **values)
        except RuntimeError as error:
            from torch import OutOfMemoryError

            if len(model.devices) == 1 or isinstance(error, CutawayError | OutOfMemoryError):
                raise
            lie = f"its weights lie on {', '.join(map(str, model.devices))}, and this needs them together"
            raise UnsupportedError(
                f"{self.name} of {model.name}", f"{lie}: {error}", "load it on one device"
            ) from error
        seconds = time.perf_counter() - started
        if not isinstance(result, self.kind):
            raise MethodError(f"method {self.name!r}", f"it returned {result!r}", f"return a {self.kind.__name__}")
        seed = bound.get("seed")
        made_by = Provenance(
            method=self.name,
            stage=self.stage,
            params=self.texts(bound),
            model=model.name,
            model_digest=model.digest,
            inputs_digest=self._inputs_digest(bound),
            versions=versions(),
            seed=seed if isinstance(seed, int) else None,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            seconds=seconds,
            created=created,
        )
        return result.replace(made_by=made_by)

    def texts(self, bound: Mapping[str, Any]) -> dict[str, str]:
        """The parameters as text; one that is None is left out."""
        return {name: self.parameters[name].form.text(v) for name, v in bound.items() if v is not None}

    def _inputs_digest(self, bound: Mapping[str, Any]) -> str:
        parts = [
            (name, content)
            for name, value in bound.items()
            if value is not None and (content := self.parameters[name].form.content(value)) is not None
        ]
        h = hashlib.sha256()
        for name, content in parts:
            h.update(f"{name} {len(content)} ".encode() + content)
        return h.hexdigest()[:16] if parts else ""


def _parameter(found: inspect.Parameter, hint: Any, help: str, asked: str) -> Parameter:
    annotation, may_be_none = without_none(hint)
    required = found.default is found.empty
    if may_be_none != (found.default is None):
        raise MethodError(
            asked,
            f"parameter '{found}' is optional in its type or its default alone",
            "write 'name: X | None = None'",
        )
    try:
        form = form_of(annotation)
    except MethodError as error:
        raise MethodError(f"{asked}, parameter {found.name!r}", error.found, error.hint) from None
    default = None if required or found.default is None else form.accept(found.default)
    return Parameter(found.name, form, default, required, help)


def args_section(doc: str) -> dict[str, str]:
    """What the ``Args`` section of a docstring says, per parameter, each as one line."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n(?=[ \t]))*)", doc, re.MULTILINE)
    found: dict[str, str] = {}
    if not section:
        return found
    body = inspect.cleandoc("\n" + section[1])
    for match in re.finditer(r"^(\w+):[ \t]*(.*(?:\n[ \t]+.*)*)", body, re.MULTILINE):
        found[match[1]] = " ".join(match[2].split())
    return found


def method(
    *, cites: str | Sequence[str] = (), example: Mapping[str, Any] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that makes a function a method; its record is the attribute ``method``.

    Args:
        cites: key or keys of the works it follows.
        example: parameters that run on a small model.

    Raises:
        MethodError: when the function is defined and its signature cannot serve as a schema.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        record = Method.of(function, (cites,) if isinstance(cites, str) else cites, example or {})

        @functools.wraps(function)
        def run(*args: Any, **params: Any) -> Any:
            if not args and "model" in params:
                return record.run(**params)
            if not args:
                raise ParameterError(f"method {record.name!r}", "no model was given", "give it as the first argument")
            return record.run(*args, **params)

        run.method = record  # type: ignore[attr-defined]
        return run

    return decorate
