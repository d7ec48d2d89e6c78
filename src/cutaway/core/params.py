"""The types of a method's parameters: what callers may write, and what the method's body receives.

============  ==========================================================  =======================================
annotation    as text                                                     the body receives
============  ==========================================================  =======================================
Prompt        the text, or ids ``#12 #7 #99``                             str, list of ids or Inputs
Prompts       as Prompt, or a JSON list ``["one", "#12 #7"]``             list of those, [batch, pos] ids or Inputs
Words         as Prompts, words of prompts                                list of str or of lists of ids
Target        the token's text (outer spaces count), or ``#11``           its id
Sites         ``L*.resid_post, L3.attn.z[5]``                             list of Site
MetricLike    ``logit_diff: #11, #22``                                    Metric
Layers        ``*``, ``3``, ``0-5+-1``                                    list of layer numbers
TowerLayers   as Layers                                                   Items or ``*``, for the tower meant
Positions     ``-1``, ``0-3+7``, ``image``, ``all``                       Items or role, for ``Inputs.select``
Image         a file                                                      PIL image
Interventions ``zero L3.attn.z[5], scale L2.mlp.out 0.5``                 list of Intervention
Cases         a file, a suite ``town:city``, or a JSON list               list of Case, or the suite's name
Settings      ``level=head, k=144``                                       dict of texts
a Result      the folder it was saved in                                  the result
============  ==========================================================  =======================================

Beside these: ``bool``, ``int``, ``float``, ``str``, ``Path``, ``Literal`` of words, ``Annotated`` bounds on them, lists
of any of them, and ``X | None`` where the default is None.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types

from cutaway.core.errors import MethodError
from cutaway.core.forms.base import DrawsForm, Form, ListOf, Plain
from cutaway.core.forms.cases import CasesForm, SettingsForm
from cutaway.core.forms.data import ImageForm, PromptForm, PromptsForm, ResultForm, WordsForm
from cutaway.core.forms.places import (
    InterventionsForm,
    LayersForm,
    MetricForm,
    PositionsForm,
    SitesForm,
    TargetForm,
    TowerLayersForm,
)

# To a type checker these are Any: callers write text where the body receives a value.
Prompt = Annotated[Any, PromptForm()]
Prompts = Annotated[Any, PromptsForm()]
Words = Annotated[Any, WordsForm()]
Target = Annotated[Any, TargetForm()]
Sites = Annotated[Any, SitesForm()]
MetricLike = Annotated[Any, MetricForm()]
Positions = Annotated[Any, PositionsForm()]
Layers = Annotated[Any, LayersForm()]
TowerLayers = Annotated[Any, TowerLayersForm()]
Image = Annotated[Any, ImageForm()]
Interventions = Annotated[Any, InterventionsForm()]
Cases = Annotated[Any, CasesForm()]
Settings = Annotated[Any, SettingsForm()]
Count = Annotated[int, annotated_types.Ge(1)]
"""A whole number, at least 1."""
DrawCount = Annotated[int, DrawsForm()]
"""How many random draws a proof compares with; 0 for no proof."""
Fraction = Annotated[float, annotated_types.Ge(0), annotated_types.Le(1)]
"""A number from 0 to 1."""

_PLAIN = {
    bool: ("switch", "true or false"),
    int: ("whole number", "a whole number"),
    float: ("number", "a number"),
    str: ("text", "a text"),
    Path: ("path", "a path"),
}


def form_of(annotation: Any) -> Form:
    """The form of an annotation; MethodError when it has none."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        for extra in args[1:]:
            if isinstance(extra, Form):
                return extra
        name, says = _PLAIN.get(args[0], ("", ""))
        if name:
            return Plain(annotation, name, says + _bounds(args[1:]))
    if origin is Literal and all(isinstance(word, str) for word in args):
        return Plain(annotation, "word", "one of " + ", ".join(args))
    if annotation in _PLAIN:
        return Plain(annotation, *_PLAIN[annotation])
    if origin in (list, tuple) and args and args[1:] in ((), (...,)):
        return ListOf(form_of(args[0]))
    if isinstance(annotation, type):
        from cutaway.core.result import Result

        if issubclass(annotation, Result):
            return ResultForm(annotation)
    raise MethodError(
        f"parameter type {getattr(annotation, '__name__', annotation)}",
        "no text form is known for it",
        "use a type listed in cutaway.core.params",
    )


def _bounds(constraints: tuple[Any, ...]) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [f"{words[k]} {getattr(c, k)}" for c in constraints for k in words if hasattr(c, k)]
    return f" ({', '.join(found)})" if found else ""


def without_none(annotation: Any) -> tuple[Any, bool]:
    """``X`` of ``X | None``, and whether None was there."""
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [each for each in get_args(annotation) if each is not type(None)]
        if len(rest) == 1:
            return rest[0], True
    return annotation, False


__all__ = [
    "Prompt",
    "Prompts",
    "Words",
    "Target",
    "Sites",
    "MetricLike",
    "Positions",
    "Layers",
    "TowerLayers",
    "Image",
    "Interventions",
    "Cases",
    "Settings",
    "Count",
    "DrawCount",
    "Fraction",
    "form_of",
    "without_none",
]
