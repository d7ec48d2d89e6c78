from __future__ import annotations

import inspect
import time
from typing import Any, Literal

import pytest
import torch

from cutaway.core.errors import MethodError, ParameterError, SiteRangeError, TokenError, UnsupportedError
from cutaway.core.method import Method, args_section, method
from cutaway.core.params import Count, Layers, Prompts, Target
from cutaway.results.grid import Grid
from cutaway.results.series import Series
from tests.unit.cli.fakes import StubModel

MODEL = StubModel("here", "d1")


def grid(values: Any) -> Grid:
    return Grid(values=values, axes=("a", "b"))


@method(cites=["one2020", "two2021"], example={"prompt": ["cat", "dog"], "k": 2})
def look(
    model: StubModel,
    prompt: Prompts,
    target: Target | None = None,
    *,
    k: Count = 3,
    layers: Layers = "*",
    how: Literal["plain", "bold"] = "plain",
    centre: bool = True,
    seed: int = 7,
) -> Grid:
    """One number per layer and prompt.

    Longer words.

    Args:
        prompt: what the model
            reads.
        k: how many: at least one.

    Raises:
        nothing: at all.
    """
    return grid([[float(k + layer + (target or 0))] * len(prompt) for layer in layers])


@method()
def late(model: StubModel, drift: Grid | None = None) -> Grid:
    """Nothing, late."""
    time.sleep(0.002)
    return grid([[1.0]])


@method()
def breaks(model: StubModel, memory: bool = False) -> Grid:
    """Nothing."""
    raise torch.OutOfMemoryError("no room") if memory else RuntimeError("two devices")


def test_a_spread_model_is_told_of_unless_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="two devices"):
        breaks(MODEL)
    monkeypatch.setattr(StubModel, "devices", (torch.device("cpu"), torch.device("meta")))
    with pytest.raises(UnsupportedError, match="its weights lie on cpu, meta, and this needs them together: two devi"):
        breaks(MODEL)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        breaks(MODEL, memory=True)


def record() -> Method:
    return look.method  # type: ignore[attr-defined]


def test_the_record_is_read_from_the_function() -> None:
    found = record()
    assert (found.name, found.stage, found.module, found.kind) == ("look", "", __name__, Grid)
    assert found.summary == "One number per layer and prompt."
    assert found.cites == ("one2020", "two2021")
    assert found.example == {"prompt": '["cat", "dog"]', "k": "2"}
    assert list(found.parameters) == ["prompt", "target", "k", "layers", "how", "centre", "seed"]
    assert found.parameters["prompt"].help == "what the model reads."
    assert found.parameters["k"].help == "how many: at least one."
    assert found.parameters["prompt"].required
    assert found.parameters["layers"].default_text == "*"
    assert found.parameters["target"].default_text == ""


def test_the_stage_is_the_package_it_lies_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(model: StubModel) -> Grid:
        """Nothing."""
        return grid([[1.0]])

    monkeypatch.setattr(plain, "__module__", "anything.methods.prove.plain")
    assert method()(plain).method.stage == "prove"  # type: ignore[attr-defined]


def test_the_function_keeps_its_name_signature_and_docstring() -> None:
    assert look.__name__ == "look"
    assert list(inspect.signature(look).parameters) == ["model", *record().parameters]
    assert look.__doc__ == inspect.unwrap(look).__doc__


def test_a_call_turns_text_into_values_and_stamps_how_to_repeat_it() -> None:
    result = look(MODEL, ["cat", "dog"], " Paris", layers="0+-1", k="5")  # type: ignore[arg-type]
    assert result.values.tolist() == [[7.0, 7.0], [10.0, 10.0]]
    made = result.made_by
    assert made is not None
    assert (made.method, made.model, made.model_digest, made.device, made.dtype) == (
        "look",
        "here",
        "d1",
        "cpu",
        "float32",
    )
    assert made.params == {
        "prompt": '["cat", "dog"]',
        "target": " Paris",
        "k": "5",
        "layers": "0+-1",
        "how": "plain",
        "centre": "true",
        "seed": "7",
    }
    assert made.seed == 7
    assert made.versions.keys() == {"python", "cutaway", "torch", "transformers", "numpy"}
    assert record().run(MODEL, **made.params).same_as(result).lines == ()


def test_provenance_says_when_it_ran_and_how_long() -> None:
    made = late(MODEL).made_by
    assert made is not None
    assert made.seconds is not None
    assert made.seconds >= 0.002
    assert made.created.endswith("+00:00")
    assert made.params == {}
    assert (made.seed, made.inputs_digest) == (None, "")


def test_the_inputs_digest_follows_what_is_read_and_nothing_else() -> None:
    def digest(*args: Any, **params: Any) -> str:
        made = look(MODEL, *args, **params).made_by
        return made.inputs_digest if made else ""

    assert digest("cat") == digest("cat", k=9) == digest(["cat"]) != digest("dog")
    assert digest(torch.tensor([1, 2])) == digest([1, 2]) == digest("#1 #2") != digest("\\#1 #2")
    assert digest(["a", "b"]) != digest(["a b"])


def test_a_result_given_as_a_parameter_counts_as_read() -> None:
    first, second = (late(MODEL, grid([[value]])).made_by for value in (1.0, 2.0))
    assert first is not None
    assert second is not None
    assert first.inputs_digest != second.inputs_digest
    with pytest.raises(ParameterError, match=r"'drift' = .* of late: it was made in memory and not saved"):
        late(MODEL, **first.params)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "given", "error", "sentence"),
    [
        ((), {"promt": "a"}, ParameterError, "no parameter 'promt'; did you mean 'prompt'?"),
        ((), {"prompt": "a", "zzz": 1}, ParameterError, "no parameter 'zzz'; it takes prompt, target"),
        ((), {}, ParameterError, "parameter 'prompt' of look: it is required; write a prompt"),
        (("a",), {"prompt": "b"}, ParameterError, "parameter 'prompt' of look: it was given twice"),
        ((*"abcdefgh",), {}, ParameterError, "8 values were given"),
        (("a",), {"k": 0}, ParameterError, "parameter 'k' = 0 of look: it should be greater than or equal to 1"),
        (("a",), {"k": None}, ParameterError, "parameter 'k' of look"),
        (("a",), {"how": "c"}, ParameterError, "parameter 'how' = 'c' of look: it should be 'plain' or 'bold'"),
        (("a",), {"target": "nope"}, TokenError, "token 'nope'"),
        (("a",), {"layers": "9"}, SiteRangeError, "layer 9"),
        ((2.5,), {}, ParameterError, "parameter 'prompt' = 2.5 of look: it is a float; write"),
    ],
)
def test_wrong_parameters_are_one_sentence(args: Any, given: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        look(MODEL, *args, **given)
    assert sentence in str(caught.value)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ParameterError, match="a str was given as the model; give a model"):
        look("gpt2", "cat")  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="no model was given"):
        look(prompt="cat")  # type: ignore[call-arg]
    assert not look(model=MODEL, prompt="cat").same_as(look(MODEL, "cat"), 0, 0)


def _no_model() -> Grid:
    """Nothing."""
    return grid([[1.0]])


def _no_doc(model: StubModel) -> Grid:
    return grid([[1.0]])


def _no_kind(model: StubModel) -> int:
    """Nothing."""
    return 1


def _no_annotation(model: StubModel, k=3) -> Grid:  # type: ignore[no-untyped-def]
    """Nothing."""
    return grid([[1.0]])


def _unknown_type(model: StubModel, k: dict[str, int]) -> Grid:
    """Nothing."""
    return grid([[1.0]])


def _half_optional(model: StubModel, k: int | None = 3) -> Grid:
    """Nothing."""
    return grid([[1.0]])


def _rest(model: StubModel, *k: int) -> Grid:
    """Nothing."""
    return grid([[1.0]])


def _stale_doc(model: StubModel, k: int = 3) -> Grid:
    """Nothing.

    Args:
        j: gone.
    """
    return grid([[1.0]])


def _not_importable(model: Absent) -> Grid:  # type: ignore[name-defined]  # noqa: F821
    """Nothing."""
    return grid([[1.0]])


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (_no_model, "it takes no model"),
        (_no_doc, "it has no docstring"),
        (_no_kind, "annotate it with one kind of Result"),
        (_no_annotation, "parameter 'k' has no annotation"),
        (_unknown_type, "parameter 'k': no text form is known for it; use a type listed in cutaway.core.params"),
        (_half_optional, "write 'name: X | None = None'"),
        (_rest, "has no name to be given by"),
        (_stale_doc, "names 'j'"),
        (_not_importable, "its annotations need 'Absent' at run time"),
    ],
)
def test_a_signature_that_is_no_schema_fails_where_it_is_defined(function: Any, sentence: str) -> None:
    with pytest.raises(MethodError) as caught:
        method()(function)
    assert sentence in str(caught.value)
    assert function.__name__ in str(caught.value)


def test_an_example_that_does_not_fit_fails_where_it_is_defined() -> None:
    with pytest.raises(MethodError, match="'nothing'"):
        method(example={"nothing": 1})(inspect.unwrap(look))
    with pytest.raises(ParameterError, match="'k' = 0"):
        method(example={"k": 0})(inspect.unwrap(look))


def test_another_kind_than_announced_is_refused() -> None:
    @method()
    def lies(model: StubModel) -> Series:
        """Nothing."""
        return grid([[1.0]])  # type: ignore[return-value]

    with pytest.raises(MethodError, match="it returned <Grid"):
        lies(MODEL)


def test_args_sections() -> None:
    assert args_section("One.\n\nArgs:\n    a: b: c\n        d.\n\n    e: f.\n\nRaises:\n    g: h.") == {
        "a": "b: c d.",
        "e": "f.",
    }
    assert args_section("One.") == {}
