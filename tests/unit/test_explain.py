"""The whole of it: an explanation names what was planted, proves it, is told, saved and made again."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import cutaway
from cutaway import specimens
from cutaway.cli import main
from cutaway.core.errors import ImageError, ParameterError, ResultError, TokenError, UnsupportedError, WeightsError
from cutaway.data import Scenes
from cutaway.explain import PARTS, explain
from cutaway.models.handle import Model
from cutaway.results.explanation import Explanation
from cutaway.results.telling.caveats import caveats

PLANTED = ("planted-llama", "planted-gpt2", "planted-gemma")


@pytest.fixture(scope="module")
def town() -> Explanation:
    return explain(cutaway.load("town"), "Eric Young lives in")


@pytest.mark.parametrize("name", PLANTED)
def test_what_was_planted_is_named_first_and_proved(name: str) -> None:
    truth = specimens.card(name).truths["prompts"][0]
    told = explain(cutaway.load(name), truth["prompt"])
    assert told.target.strip() == truth["answer"]
    assert told["heads"].items[0] == truth["head"]
    assert told["ffn_neurons"].items[0] == truth["value_neuron"]
    assert told["head_positions"].columns["source"][0] == truth["query_neuron_position"]
    assert told.log_prob == pytest.approx(truth["log_probability"], abs=1e-4)
    assert told["heads"].proof.effect[-1] > 1.0
    assert told["query_neurons"].items[0] == truth["query_neuron"]


def test_every_part_is_there_and_every_located_one_is_proved(town: Explanation) -> None:
    assert not town.refused
    assert set(town.parts) == {name for name in PARTS if name != "image_patches"}
    assert {"layers", "heads", "head_positions", "ffn_neurons", "attention_neurons"} <= set(town.proofs)
    assert town.proved
    assert town.proof is not None
    assert town.proof.holds
    assert town.proof.effect[-1] > town["ffn_neurons"].proof.effect[-1]


def test_a_question_about_an_image_is_traced_to_its_patch() -> None:
    world, model = Scenes(seed=0), cutaway.load("scenes")
    scene, question = world.exam(1, "colour")[0]
    told = explain(model, question.prompt, image=scene.image())
    assert told.target == question.answer
    patches = told["image_patches"]
    thing = scene.find(question.subject)
    assert thing is not None
    best = np.unravel_index(int(patches.values[patches.along("map").index("two-hop")].argmax()), (4, 4))
    assert best == (thing.row, thing.column)
    assert f"the patch in row {thing.row + 1}, column {thing.column + 1} brings most" in " ".join(told.story)
    assert told.image is not None
    assert told["image_patches"].proof.holds
    assert "data:image/png;base64" in told.page()


def test_an_answer_that_the_image_has_no_part_in_is_called_a_hallucination() -> None:
    model = cutaway.load("scenes")
    scene, question = Scenes(seed=0).exam(1, "colour")[0]
    told = explain(model, question.prompt, image=scene.image())
    share = told["image_patches"].figures["image share"]
    assert not any("hallucination" in line for line in told.caveats)
    low = told["image_patches"].replace(figures={"image share": 0.05})
    assert share > 0.5
    assert any("Likely a hallucination" in line for line in caveats(told.replace(parts={"image_patches": low})))


def test_the_proof_is_what_taking_away_does(town: Explanation) -> None:
    model = cutaway.load("town")
    named = town["ffn_neurons"]
    inputs = model.inputs("Eric Young lives in")
    zeros = [cutaway.Zero(item) for item in named.items[: named.proof.ks[-1]]]
    logits = model.trace(inputs, do=zeros).logits
    assert logits is not None
    after = logits[0, -1].log_softmax(-1)[model.token(" Milby")]
    assert town.log_prob - float(after) == pytest.approx(named.proof.effect[-1], abs=1e-4)


def test_the_story_has_the_numbers(town: Explanation) -> None:
    text = " ".join(town.story)
    assert "town continues with ‘Milby’ (99.96 %)" in text
    best = town["ffn_neurons"]
    assert f"({best.scores[0]:+.3g})" in text
    assert f"falls by {town.proof.effect[-1]:.3g} nats" in text if town.proof else False
    assert any("saturated" in line and "--versus ' Norton'" in line for line in town.caveats)


def test_it_is_saved_opened_and_never_buried(town: Explanation, tmp_path: Path) -> None:
    folder = town.save(tmp_path / "told")
    assert {each.name for each in folder.iterdir()} == {"report.html", "explanation.json", "tables"}
    assert {each.stem for each in (folder / "tables").iterdir()} == set(town.parts)
    opened = cutaway.open(folder)
    assert opened == town
    assert opened.parts["heads"].proof.effect[-1] == town["heads"].proof.effect[-1]
    with pytest.raises(ResultError, match="it holds a result"):
        town.save(folder)
    town.save(folder, overwrite=True)
    (folder / "mine.txt").write_text("keep me")
    with pytest.raises(ResultError, match=r"also holds mine\.txt"):
        town.save(folder, overwrite=True)


def test_a_terminal_takes_one_screenful(town: Explanation) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(town)
    assert len(console.file.getvalue().splitlines()) <= 45
    assert "layer 0 neuron 292" in console.file.getvalue()


def test_the_same_again_equals(town: Explanation, tmp_path: Path) -> None:
    town.save(tmp_path / "told")
    assert cutaway.rerun(tmp_path / "told").equal
    other = explain(cutaway.load("town"), "Eric Young works for")
    assert any(line.startswith("heads: ") for line in town.same_as(other).lines)


def test_a_rival_makes_scores_and_proofs_logit_differences() -> None:
    model = cutaway.load("town")
    told = explain(model, "Eric Young lives in", versus=" Norton")
    assert told["heads"].unit == "logits"
    assert told["heads"].proof.metric == "the logit difference"
    inputs = model.inputs("Eric Young lives in")
    zeros = [cutaway.Zero(item) for item in told["heads"].items[: told["heads"].proof.ks[-1]]]
    logits = model.trace(inputs, do=zeros).logits
    assert logits is not None
    mine, rival = model.token(" Milby"), model.token(" Norton")
    before = model(inputs)[0, -1]
    drop = (before[mine] - before[rival]) - (logits[0, -1, mine] - logits[0, -1, rival])
    assert told["heads"].proof.effect[-1] == pytest.approx(float(drop), abs=1e-3)


def test_another_target_is_said_to_be_one() -> None:
    told = explain(cutaway.load("town"), "Eric Young lives in", target=" Norton")
    assert told.rank == 1
    assert any("comes in place 2" in line for line in told.story)
    assert any("not what the model says" in line for line in told.caveats)


def test_a_part_that_is_refused_does_not_cost_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(asked: Any) -> Any:
        raise UnsupportedError("neurons", "they are hidden", "ask for heads")

    def broken(asked: Any) -> Any:
        raise RuntimeError("shape mismatch\nand more")

    monkeypatch.setitem(PARTS, "ffn_neurons", refuse)
    monkeypatch.setitem(PARTS, "attention_neurons", broken)
    told = explain(cutaway.load("planted-llama"), "Ada plays")
    assert told.refused["ffn_neurons"] == "neurons: they are hidden; ask for heads."
    assert told.refused["attention_neurons"] == "it broke: RuntimeError: shape mismatch and more"
    assert "missing" in told.refused["writes"]
    assert "they are hidden" in told.page()
    assert told["heads"].proof is not None
    with pytest.raises(ResultError, match="they are hidden"):
        told["ffn_neurons"]
    with pytest.raises(ResultError, match="did you mean 'heads'"):
        told["head"]


def test_what_cannot_be_explained_is_refused_before_the_work() -> None:
    model = cutaway.load("planted-llama")
    with pytest.raises(TokenError):
        explain(model, "Ada plays", target=" no such token at all")
    with pytest.raises(ParameterError, match="it is the token that is explained"):
        explain(model, "Ada plays", versus=" golf")
    with torch.no_grad():
        next(model.hf.parameters()).fill_(float("nan"))
    with pytest.raises(WeightsError):
        explain(Model(model.hf, model.processor), "Ada plays")


def test_the_package_hands_out_the_function_in_whatever_order_it_is_asked() -> None:
    assert callable(cutaway.explain)
    module = importlib.import_module("cutaway.explain")
    cutaway.__dict__["explain"] = module  # what importing the module first leaves
    assert cutaway.explain(cutaway.load("planted-llama"), "Ada plays").target == "golf"


def test_the_command_line_explains_a_specimen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUTAWAY_CACHE", str(tmp_path / "cache"))
    assert main(["explain", "planted-llama", "--out", "told", "--json"]) in (0,)
    found = json.loads(capsys.readouterr().out)
    assert found["fields"]["prompt"] == "Ada plays"
    assert (tmp_path / "told" / "report.html").is_file()
    assert main(["explain", "planted-llama", "--out", "told"]) == 1
    assert "add --overwrite" in capsys.readouterr().err
    assert main(["explain", "planted-llama", "--prompt", "Ada plays", "--target", "nothing at all"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unproved_explanation_says_so_and_strict_makes_it_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUTAWAY_CACHE", str(tmp_path / "cache"))
    assert main(["explain", "scenes"]) == 0
    captured = capsys.readouterr()
    assert "⚠ not proved: FFN neurons" in captured.out
    assert captured.err.startswith("warning: not proved: ffn neurons")
    assert main(["explain", "scenes", "--strict"]) == 3


def test_a_folder_that_holds_something_else_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cutaway.explain.PARTS", {})
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").touch()
    assert main(["explain", "planted-llama", "--out", str(tmp_path / "taken"), "--overwrite"]) == 1
    assert "it is or holds mine.txt, which is no result" in capsys.readouterr().err
    assert main(["explain", "scenes", "--prompt", "<image> What colour is the square?"]) == 2
    assert "a place for an image, '<image>', and none is given" in capsys.readouterr().err
    assert main(["explain", "twon"]) == 2
    assert "did you mean 'town'" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["query_neurons", "logit_flow", "neuron_attribution", "neuron_projection", "ablate"])
def test_a_place_for_an_image_without_an_image_is_refused(method: str) -> None:
    given = {"sites": "L1.mlp.act[0]"} if method in ("neuron_projection", "ablate") else {}
    with pytest.raises(ImageError, match="a place for an image, '<image>', and none is given; give one"):
        cutaway.run(method, cutaway.load("scenes"), prompt="<image> What colour is the square?", **given)


@pytest.mark.parametrize("method", ["query_neurons", "logit_flow", "neuron_attribution", "image_patches"])
def test_a_token_is_no_rival_of_itself(method: str) -> None:
    model = cutaway.load("scenes")
    scene, question = Scenes(seed=0).exam(1, "colour")[0]
    with pytest.raises(ParameterError, match="it is the token that is explained"):
        cutaway.run(method, model, prompt=question.prompt, image=scene.image(), target="#5", versus="#5")


def test_places_that_cannot_be_written_are_refused_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cutaway.explain.PARTS", {"none": None})
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "why", tmp_path / "file" / "why.html"):
        assert main(["explain", "planted-llama", "--out", str(out)]) == 1
        assert f"nothing can be made in '{tmp_path}/file' (Not a directory)" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_what_parts_say_of_themselves_is_kept(town: Explanation) -> None:
    assert any("evaluated exactly" in note for note in town["ffn_neurons"].notes)
    assert any("value neurons add" in note for note in town["query_neurons"].notes)
    assert not any("no proof was asked for" in note for part in town.parts.values() for note in part.notes)
    page = town.page()
    assert "<summary>Notes of the parts</summary>" in page
    assert "evaluated exactly" in page


def test_a_gain_is_told_as_one_and_is_no_proof() -> None:
    told = explain(cutaway.load("town"), "Eric Young lives in", target=" Alder")
    assert told["heads"].proof.effect[-1] < 0
    assert "heads" in told.unproved
    assert any("log p(target) rises by" in line for line in told.story)
    assert not any("next to nothing" in line for line in told.caveats)


def test_chips_wrap_and_missing_numbers_are_blank() -> None:
    told = explain(cutaway.load("planted-llama"), "Ada plays", k=1)
    assert np.isnan(np.asarray(told["heads"].columns["drop without it"], dtype=float)).any()
    page = told.page()
    assert page.count("<wbr>") == len(told.tokens) - 1
    assert ">nan<" not in page


def test_a_narrow_terminal_still_names_tokens(town: Explanation) -> None:
    text = io.StringIO()
    Console(file=text, width=80).print(town.summary())
    assert "from ‘Young’" in text.getvalue() or "from ‘Eric’" in text.getvalue()


def test_made_of_inputs_there_is_no_command(tmp_path: Path) -> None:
    model = cutaway.load("scenes")
    scene, question = Scenes(seed=0).exam(1, "colour")[0]
    told = cutaway.run("explain", model, prompt=model.inputs(question.prompt, image=scene.image()))
    assert told.command == ""
    assert "in memory" in told.page()


def test_a_model_that_is_no_specimen_needs_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(tmp_path)]) == 2
    assert "no prompt is given; write --prompt" in capsys.readouterr().err


def test_scores_of_a_part_are_those_of_the_method_alone(town: Explanation) -> None:
    alone = cutaway.run("neuron_attribution", cutaway.load("town"), prompt="Eric Young lives in", k=10)
    assert list(alone.items) == list(town["ffn_neurons"].items)
    assert np.allclose(alone.scores, town["ffn_neurons"].scores, atol=1e-6)
