"""What every method keeps, on every architecture; read from the catalog, so that a new method is covered as it lands.

A method brings its ``example``: parameters, as text, that run on a small model without a tokenizer. One whose example
names an image runs on small vision-language models with their processors, and refuses the others.
"""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import cutaway
from cutaway import catalog
from cutaway.core.errors import CutawayError, ParameterError
from cutaway.core.method import Method, Parameter
from cutaway.core.result import Result
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.results import open_result
from tests import architectures
from tests.architectures import ARCHITECTURES, IMAGE, TEXT
from tests.traces import Traces
from tests.unit.models.vlm_folders import SIDE, save

METHODS = catalog.methods()
EACH = pytest.mark.parametrize("method", METHODS)
EVERY = pytest.mark.parametrize("name", ARCHITECTURES)
FOLDERS = {"llava": "llava", "qwen-vl": "qwen2_5_vl"}
HALF = 0.15
"""How far a number may move in bfloat16, against the spread of its array; against that of the result's largest array
where there are too few numbers for a spread, such as areas under its curves."""


class Outcome(NamedTuple):
    """What a method gave, or the sentence with which it refused the architecture."""

    result: Result | None
    refusal: str


@cache
def place() -> Path:
    """A folder for this run."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def picture() -> str:
    """The image of every example that names one."""
    noise = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(place() / "image.png")
    return str(place() / "image.png")


@cache
def seeing(name: str) -> Model:
    """A vision-language model with its processor."""
    folder = place() / name
    folder.mkdir()
    save(FOLDERS[name], folder)
    loaded = load(folder)
    inputs = loaded.inputs("what is here", picture())
    loaded.hf(**inputs.kwargs(loaded.device))  # in its first pass transformers hangs hooks of its own on the tower
    return loaded


def sees(method: str) -> bool:
    """Whether the method takes an image."""
    return "image" in METHODS[method].example


def example(method: str) -> dict[str, Any]:
    """The method's example."""
    return METHODS[method].example | ({"image": picture()} if sees(method) else {})


def simple(method: str) -> str:
    """The architecture that every method serves, or every method that takes an image."""
    return "llava" if sees(method) else "grouped-query"


def model(method: str, name: str) -> Model:
    """The shared model of an architecture; with its processor where the method takes an image."""
    return seeing(name) if sees(method) and name in IMAGE else architectures.model(name)


def fresh(method: str, name: str) -> Model:
    """A copy that a test may change."""
    shared = model(method, name)
    return Model(copy.deepcopy(shared.hf), shared.processor, name=shared.name)


def run(method: str, of: Model, **changes: Any) -> Result:
    """The method's example on a model."""
    return METHODS[method].run(of, **{**example(method), **changes})


@cache
def outcome(method: str, name: str) -> Outcome:
    """The example on the shared model, once."""
    try:
        return Outcome(run(method, model(method, name)), "")
    except CutawayError as error:
        return Outcome(None, str(error))


def given(method: str, name: str) -> Result:
    """The result on an architecture; the simple one's where the method refuses this one with its reason."""
    found = outcome(method, name)
    if found.result is not None:
        return found.result
    assert ": " in found.refusal
    assert name != simple(method), found.refusal
    instead = outcome(method, simple(method)).result
    assert instead is not None
    return instead


def test_every_method_has_an_example_that_runs() -> None:
    assert METHODS
    for name, record in METHODS.items():
        assert record.example or not any(p.required for p in record.parameters.values()), name
        assert outcome(name, simple(name)).refusal == ""


@EACH
def test_most_architectures_are_served(method: str) -> None:
    asked = IMAGE if sees(method) else list(ARCHITECTURES)
    refused = {name: outcome(method, name).refusal for name in asked if outcome(method, name).result is None}
    assert len(refused) <= len(asked) // 2, refused


@EVERY
@EACH
def test_it_returns_its_kind_with_a_check_that_holds_and_finite_numbers(method: str, name: str) -> None:
    result = given(method, name)
    assert type(result) is METHODS[method].kind
    assert result.check is None or result.check.holds, str(result.check)
    for array, data in result.arrays().items():
        assert data.size, array
        assert data.dtype.kind != "f" or not (np.isinf(data).any() or np.isnan(data).all()), array  # NaN: no number
    assert result.proof is None or result.proof.distinct is not None  # a random set drawn twice counts once
    made = result.made_by
    assert made is not None
    assert made.method == method
    assert made.stage == METHODS[method].stage


@EVERY
@EACH
def test_it_survives_being_saved_and_opened(method: str, name: str, tmp_path: Path) -> None:
    result = given(method, name)
    opened = open_result(result.save(tmp_path / "result"))
    assert type(opened) is type(result)
    assert opened == result
    assert opened.same_as(result, rtol=0, atol=0).lines == ()


@EVERY
@EACH
def test_its_picture_is_a_valid_specification_and_its_table_is_full(method: str, name: str) -> None:
    import altair

    result = given(method, name)
    spec = result.spec()
    assert spec["$schema"].startswith("https://vega.github.io/schema/vega-lite/")
    shown = copy.deepcopy(spec)
    if "values" in shown.get("data", {}):
        shown["data"]["values"] = shown["data"]["values"][:2]  # the grammar of the rest is the same
    altair.Chart.from_dict(shown).to_dict()
    assert len(result.table())


@EVERY
@EACH
def test_it_says_the_same_twice_and_leaves_the_model_as_it_was(method: str, name: str) -> None:
    of = fresh(method, name)
    first = outcome(method, name).result
    if first is None:
        with pytest.raises(CutawayError):
            run(method, of)
    before = Traces.of(of.hf)
    if first is not None:
        assert run(method, of).same_as(first, rtol=0, atol=1e-6).lines == ()
    else:
        with pytest.raises(CutawayError):
            run(method, of)
    assert Traces.of(of.hf).differences(before) == []


@EACH
def test_it_leaves_a_model_in_training_mode_and_with_frozen_weights_alone(method: str) -> None:
    of = fresh(method, simple(method))
    of.hf.requires_grad_(False).train()
    before = Traces.of(of.hf)
    run(method, of)
    assert Traces.of(of.hf).differences(before) == []


@EACH
def test_a_saved_result_is_made_again(method: str, tmp_path: Path) -> None:
    of = model(method, simple(method))
    folder = given(method, simple(method)).save(tmp_path / "result")
    again = cutaway.rerun(folder, of)
    assert again.equal, str(again)
    other = fresh(method, simple(method))
    next(other.hf.parameters()).data[0] += 1
    with pytest.raises(CutawayError, match="weights"):
        cutaway.rerun(folder, other)


@pytest.mark.parametrize("name", [n for n in TEXT if n not in ("experts", "sinks")])
@EACH
def test_bfloat16_is_near(method: str, name: str) -> None:
    exact = outcome(method, name).result
    if exact is None:
        name = simple(method)
        exact = outcome(method, name).result
    assert exact is not None
    copied = fresh(method, name)
    half = run(method, Model(copied.hf.bfloat16(), copied.processor))
    assert half.made_by is not None
    assert half.made_by.dtype == "bfloat16"
    ours, theirs = exact.arrays(), half.arrays()
    assert ours.keys() == theirs.keys()
    largest = max((data for data in ours.values() if data.dtype.kind == "f"), key=lambda data: data.size)
    for array, data in ours.items():
        if data.dtype.kind == "f" and data.shape == theirs[array].shape:
            whole = data if np.isfinite(data).sum() > 2 else largest
            spread = float(np.nanmax(whole) - np.nanmin(whole)) or 1.0
            assert np.nanmedian(np.abs(data - theirs[array])) <= HALF * spread, array


def _of_ids(record: Method) -> list[Parameter]:
    """The prompts that the example gives as ids."""
    prompts = [p for p in record.parameters.values() if p.form.name in ("prompt", "prompts")]
    return [p for p in prompts if record.example.get(p.name, "").startswith("#")]


@EACH
def test_ids_may_be_tensors_lists_or_text(method: str) -> None:
    record, of = METHODS[method], model(method, simple(method))
    expected = given(method, simple(method))
    for prompt in _of_ids(record):
        ids = [int(word[1:]) for word in record.example[prompt.name].split()]
        for form in (ids, tuple(ids), torch.tensor(ids), np.array(ids), of.inputs([ids])):
            assert run(method, of, **{prompt.name: form}).same_as(expected, rtol=0, atol=1e-6).lines == ()


@EACH
def test_padding_around_a_prompt_changes_nothing(method: str) -> None:
    """A row of a batch is the prompt; where several prompts are taken, it does not matter how they are padded."""
    record, of = METHODS[method], model(method, simple(method))
    expected = given(method, simple(method))
    several = [p.name for p in record.parameters.values() if p.form.name == "prompts"]
    paired = [name for name in several if name in record.example]  # prompts that line up are given together
    for names in [paired, *([name] for name in several if name not in paired)]:
        rows = {name: [[70 + i, 71, 72, 73], [80, 71, 72, 83 + i, 84, 85]] for i, name in enumerate(names)}
        there = {"positions": "-3--1"} if "positions" in record.parameters else {}  # they have as many in all rows
        left, right = (
            run(method, of, **there, **{name: of.inputs(each, padding_side=s) for name, each in rows.items()})
            for s in ("left", "right")
        )
        assert left.same_as(right, rtol=1e-4, atol=1e-5).lines == ()
    for prompt in _of_ids(record):
        ids = [int(word[1:]) for word in record.example[prompt.name].split()]
        for side in ("left", "right"):
            row = of.inputs([ids, [*ids, 7, 8]], padding_side=side).row(0)
            assert run(method, of, **{prompt.name: row}).same_as(expected, rtol=0, atol=1e-5).lines == ()


@EACH
def test_an_unknown_parameter_is_refused_with_the_nearest(method: str) -> None:
    record = METHODS[method]
    wrong = next(iter(record.parameters)) + "x"
    with pytest.raises(ParameterError, match=f"no parameter '{wrong}'"):
        run(method, model(method, simple(method)), **{wrong: 1})
    with pytest.raises(ParameterError, match="was given as the model"):
        record.run(model(method, simple(method)).hf, **record.example)  # type: ignore[arg-type]


@EACH
def test_a_required_parameter_left_out_is_named(method: str) -> None:
    record = METHODS[method]
    for parameter in _required(record):
        given = {k: v for k, v in record.example.items() if k != parameter.name}
        with pytest.raises(ParameterError, match=f"parameter '{parameter.name}' of {method}: it is required"):
            record.run(model(method, simple(method)), **given)


def _required(record: Method) -> list[Parameter]:
    return [p for p in record.parameters.values() if p.required]


@EACH
def test_weights_that_are_not_finite_are_refused(method: str) -> None:
    of = fresh(method, simple(method))
    inside = "model.language_model" if sees(method) else "model"
    of.hf.get_submodule(f"{inside}.layers.1.mlp.down_proj").weight.data[0, 0] = float("nan")
    with pytest.raises(CutawayError, match=rf"{inside}.layers.1.mlp.down_proj.weight holds NaN"):
        run(method, of)
