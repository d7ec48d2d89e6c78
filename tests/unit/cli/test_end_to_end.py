"""A method as ``make new-method`` writes it, on a real model, through every door."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

import cutaway
from cutaway import catalog
from cutaway.cli import main
from cutaway.core.errors import LoadError
from tests.unit.cli.fakes import install
from tools import new_method

MODEL = "planted-llama"
METHOD, TEST, _ = new_method.files("my_thing", "see").values()


@pytest.fixture(autouse=True)
def _started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "started", {"see/my_thing.py": METHOD})
    monkeypatch.chdir(tmp_path)


def test_the_test_that_comes_with_it_passes(tmp_path: Path) -> None:
    path = tmp_path / "test_my_thing.py"
    path.write_text(TEST)
    spec = importlib.util.spec_from_file_location("test_my_thing", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.test_lengths_are_those_of_hugging_faces_hidden_states()


def test_python_and_the_command_line_say_the_same_and_can_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["my_thing", MODEL, "--prompt", "#1 #2 #3", "--json", "--out", "saved"]) == 0
    printed = json.loads(capsys.readouterr().out)
    result = cutaway.run("my_thing", cutaway.load(MODEL), prompt=[1, 2, 3])
    assert printed["arrays"]["values"]["data"] == result.values.ravel().tolist()
    assert printed["made_by"]["params"] == {"prompt": "#1 #2 #3"}
    assert not result.same_as(catalog.rerun("saved").result, rtol=0, atol=0)
    assert main(["rerun", "saved", "--rtol", "0", "--atol", "0"]) == 0
    assert capsys.readouterr().out == "equal\n"


def test_a_model_made_in_memory_has_to_be_given_again() -> None:
    hf = cutaway.load(MODEL).hf
    hf.config.name_or_path = ""
    model = cutaway.Model(hf)
    cutaway.run("my_thing", model, prompt="#1 #2 #3").save("saved")
    with pytest.raises(LoadError, match="a model made in memory has to be given again"):
        catalog.rerun("saved")
    assert catalog.rerun("saved", model).equal


def test_the_lower_precision_of_a_model_is_used_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["my_thing", MODEL, "--prompt", "#1 #2 #3", "--dtype", "bfloat16", "--out", "saved"]) == 0
    again = catalog.rerun("saved")
    assert again.equal
    assert again.result.made_by is not None
    assert again.result.made_by.dtype == "bfloat16"
    assert again.notes == ()


@pytest.mark.parametrize("words", [["sites", MODEL], ["doctor", MODEL]])
def test_the_tables_of_a_model(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--json"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) > 5
    assert captured.err == ""


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["my_thing", "./nothing/here", "--prompt", "#1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
