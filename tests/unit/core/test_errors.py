"""Errors: one sentence of what was asked, what was found and what to try."""

from __future__ import annotations

import pickle

import pytest

from cutaway.core import errors
from cutaway.core.errors import CutawayError, SiteRangeError, nearest

CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, CutawayError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_is_in_the_tree_of_the_docstring_and_keeps_its_parts(kind: type[CutawayError]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")
    error = kind("asked 'x'", "found 3", "try 4")
    assert str(error) == "asked 'x': found 3; try 4."
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.asked, again.found, again.hint) == (
        kind,
        str(error),
        *("asked 'x'", "found 3", "try 4"),
    )
    assert kind.exit_code in (1, 2)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [(("a", "b"), "a: b."), (("", "b", "c."), "b; c."), (("a", "b", "did you mean 'c'?"), "a: b; did you mean 'c'?")],
)
def test_the_sentence_ends_once(parts: tuple[str, ...], sentence: str) -> None:
    assert str(CutawayError(*parts)) == sentence


def test_python_catches_them_by_their_nature_too() -> None:
    assert issubclass(SiteRangeError, LookupError)
    assert issubclass(errors.InputError, ValueError)
    assert issubclass(errors.InterventionError, ValueError)


def test_the_nearest_name_is_offered_and_a_far_one_is_not() -> None:
    assert nearest("resid_pst", ["resid_post", "embed"]) == "did you mean 'resid_post'?"
    assert nearest("zzz", ["resid_post"]) == ""
