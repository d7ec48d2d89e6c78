"""A method over many prompts, where what every prompt's answer hangs on is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cutaway
from cutaway import catalog, specimens
from cutaway.aggregation import aggregate, values_of
from cutaway.cli import main
from cutaway.core.cases import Case, cases_of, read_cases
from cutaway.core.errors import InputError, ParameterError, UnknownMethodError
from cutaway.core.method import Method
from cutaway.data import suite, suites
from cutaway.methods.locate.neuron_attribution import neuron_attribution
from cutaway.ops.stats import bootstrap_means
from cutaway.results import Grid, Ranking, Table

TRUTHS = specimens.card("planted-llama").truths["prompts"]
PROMPTS = [truth["prompt"] for truth in TRUTHS]


def test_what_is_planted_in_every_prompt_is_always_among_the_first() -> None:
    model = cutaway.load("planted-llama")
    found = aggregate(model, "neuron_attribution", PROMPTS, settings={"level": "head", "k": 100}, k=1)
    assert found.items[0] == "L1.attn.z[2]"
    assert found.scores[0] == pytest.approx(np.mean([t["head_importance"] for t in TRUTHS]), abs=1e-4)
    assert found.columns["frequency"][0] == 1.0
    assert found.columns["low"][0] <= found.scores[0] <= found.columns["high"][0]
    assert list(found.columns["prompts"]) == [len(PROMPTS)] * len(found)
    assert found.proof is not None
    assert found.proof.holds
    each = [neuron_attribution(model, prompt, level="head", k=100).proof for prompt in PROMPTS]
    assert found.proof.distinct == max(proof.n_distinct for proof in each if proof is not None)
    assert found.notes[0].startswith(f"{len(PROMPTS)} of {len(PROMPTS)} prompts, 0 of them failed")


def test_types_and_frequencies_are_those_of_the_prompts_alone() -> None:
    model = cutaway.load("planted-llama")
    cases = [{"prompt": p, "type": p.split()[1]} for p in PROMPTS]
    found = aggregate(model, "neuron_attribution", cases, settings="k=3, draws=0", k=3)
    alone = [cutaway.run("neuron_attribution", model, prompt=p, k=3, draws=0) for p in PROMPTS]
    for i, item in enumerate(found.items):
        scores = [dict(zip(r.items, r.scores, strict=True)).get(item) for r in alone]
        assert found.scores[i] == pytest.approx(sum(s or 0.0 for s in scores) / len(alone))
        assert found.columns["frequency"][i] == np.mean([s is not None and s > 0 for s in scores])
        assert found.columns["where listed"][i] == pytest.approx(np.mean([s for s in scores if s is not None]))
        plays = [s or 0.0 for s, p in zip(scores, PROMPTS, strict=True) if p.endswith("plays")]
        assert found.columns["mean: plays"][i] == pytest.approx(np.mean(plays))
    assert found.proof is None


def test_prompts_that_fail_are_named_and_the_rest_goes_on() -> None:
    model = cutaway.load("planted-llama")
    cases = [{"prompt": "Ada plays"}, {"prompt": "Ada plays", "target": "no such token"}, {"prompt": "Bea plays"}]
    found = aggregate(model, "neuron_attribution", cases, settings={"draws": 0})
    assert found.notes[0].startswith("3 of 3 prompts, 1 of them failed")
    assert any(note.startswith("prompt 2 failed: token 'no such token'") for note in found.notes)
    with pytest.raises(InputError, match="all failed, the first with: token"):
        aggregate(model, "neuron_attribution", cases[1:2])


def test_a_prompt_that_breaks_does_not_cost_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    record, model = catalog.get("neuron_attribution"), cutaway.load("planted-llama")

    def once(asked: Any, prompt: str, **given: Any) -> Any:
        if prompt == PROMPTS[0]:
            message = "a tensor\n of another shape"
            raise RuntimeError(message)
        return neuron_attribution(asked, prompt, **given)

    monkeypatch.setattr("cutaway.aggregation.catalog.get", lambda _: replace(record, function=once))
    found = aggregate(model, "neuron_attribution", PROMPTS[:2], settings={"draws": 0})
    assert "prompt 1 failed: it broke: RuntimeError: a tensor of another shape" in found.notes


def test_what_a_case_brings_comes_before_the_settings() -> None:
    model = cutaway.load("planted-llama")
    case = {"prompt": "Ada plays", "target": TRUTHS[1]["answer"]}
    found = aggregate(model, "neuron_attribution", [case], settings={"target": TRUTHS[0]["answer"], "draws": 0})
    alone = cutaway.run("neuron_attribution", model, prompt="Ada plays", target=TRUTHS[1]["answer"], draws=0)
    assert found.items[0] == alone.items[0]
    assert found.scores[0] == pytest.approx(alone.scores[0])
    with pytest.raises(ParameterError, match="a setting 'prompt': the prompts are given beside the settings"):
        aggregate(model, "neuron_attribution", [case], settings={"prompt": "Ada plays"})


def test_what_heads_bring_from_positions_is_added_up_unless_told_otherwise() -> None:
    ranking = Ranking(items=("L0.attn.z[1] from 2", "L0.attn.z[1] from 3", "L1.mlp.act[0]"), scores=[1.0, 0.5, 2.0])
    assert values_of(ranking) == {"L0.attn.z[1]": 1.5, "L1.mlp.act[0]": 2.0}
    assert len(values_of(ranking, sources=True)) == 3
    grid = Grid(values=[[1.0, np.nan]], axes=("layer", "position"), labels={"position": (" Ada", " Bea")})
    assert values_of(grid) == {"layer 0, position 0": 1.0}
    with pytest.raises(ParameterError, match="its result is of the kind 'table'"):
        values_of(Table(columns={"a": [1]}))


def test_layers_of_a_readout_are_averaged() -> None:
    model = cutaway.load("planted-llama")
    found = aggregate(model, "logit_lens", [{"prompt": t["prompt"], "answer": t["answer"]} for t in TRUTHS])
    assert found.items[0] == f"layer {model.n_layers - 1}"
    assert found.scores[0] == pytest.approx(np.mean([t["log_probability"] for t in TRUTHS]), abs=1e-4)


def test_what_cannot_be_run_over_prompts_is_refused() -> None:
    model = cutaway.load("planted-llama")
    with pytest.raises(UnknownMethodError, match="neuron_attribution"):
        aggregate(model, "neuron_atribution", PROMPTS)
    with pytest.raises(ParameterError, match="takes clean, corrupt"):
        aggregate(model, "patch", PROMPTS)
    with pytest.raises(ParameterError, match="there is no parameter 'levl'; did you mean 'level'"):
        aggregate(model, "neuron_attribution", PROMPTS, settings={"levl": "head"})
    with pytest.raises(InputError, match="no suite of that name; did you mean 'town:city'"):
        aggregate(model, "neuron_attribution", "town:cty")


def test_a_method_that_cannot_be_aggregated_is_refused_before_it_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cutaway.load("planted-llama")
    running: Any = aggregate.method.function  # type: ignore[attr-defined]
    monkeypatch.setattr(Method, "run", lambda *_, **__: pytest.fail("it was run"))
    fit = "choose one of .*logit_lens.*neuron_attribution"
    refused = {
        "attention_pattern": f"it gives a Pattern, whose parts cannot be matched between prompts; .*{fit}",
        "neuron_chain": f"it gives a Graph, .*{fit}",
        "edges": "no single prompt; it takes many at once: give them to its own 'clean' and 'corrupt'",
        "head_kinds": "no single prompt; it takes many at once: give them to its own 'prompts'",
        "logit_lens": "no target is named to be averaged; write --settings target=TOKEN",
    }
    for name, said in refused.items():
        with pytest.raises(ParameterError, match=said):
            running(model, name, cases_of(PROMPTS, "prompts"))


def test_a_file_is_lines_json_lines_or_a_table(tmp_path: Path) -> None:
    lines, objects, table = tmp_path / "p.txt", tmp_path / "p.jsonl", tmp_path / "p.csv"
    lines.write_text("one\n\n#1 #2\n")
    objects.write_text('{"prompt": "one", "target": " x", "image": "i.png"}\n"two"\n')
    table.write_text('prompt,type,target\n"one, two",a,\nthree,b, y\n')
    assert [c.prompt for c in read_cases(lines)] == ["one", "#1 #2"]
    assert read_cases(objects) == (Case(prompt="one", target=" x", image=str(tmp_path / "i.png")), Case(prompt="two"))
    assert read_cases(table) == (Case(prompt="one, two", type="a"), Case(prompt="three", type="b", target=" y"))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{', "line 2: it is not JSON"),
        ("p.jsonl", '{"promt": "a"}', "case 1: it has 'promt'; did you mean 'prompt'"),
        ("p.jsonl", '{"target": "a"}', "case 1: it has no prompt"),
        ("p.jsonl", "3", "case 1: it is 3"),
        ("p.csv", "a,b\n1,2\n", "its columns are a, b; name one 'prompt'"),
        ("p.txt", "\n", "there is no prompt"),
    ],
)
def test_a_file_that_holds_no_cases_says_where(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        read_cases(tmp_path / name)


def test_every_suite_has_cases_with_answers() -> None:
    assert {"town:city", "town:two-hop", "scenes:colour", "scenes:absent-star", "labels", "recall"} <= suites().keys()
    for name in (
        "town:city",
        "town:two-hop",
        "scenes:colour",
        "scenes:absent-star",
        "scenes:absent",
        "labels",
        "recall",
    ):
        cases = suite(name)
        assert all(case.prompt and case.answer for case in cases), name
    assert {case.type for case in suite("town")} >= {"fact", "two-hop", "sum"}
    assert suite("scenes:colour")[0].image.size == (48, 48)


def test_intervals_of_means_cover_and_repeat() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for i in range(100):
        low, high = bootstrap_means(torch.randn(40, 1, generator=generator), 400, i)
        inside += bool(low[0] <= 0 <= high[0])
    assert 85 <= inside <= 100
    values = torch.randn(10, 3, generator=generator)
    assert torch.equal(bootstrap_means(values, 50, 1)[0], bootstrap_means(values, 50, 1)[0])


def test_the_command_line_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.csv").write_text("prompt,type\nAda plays,a\nBea plays,b\n")
    words = ["aggregate", "planted-llama", "--method", "neuron_attribution", "--prompts", "p.csv"]
    assert main([*words, "--settings", "level=head", "--settings", "k=50", "--out", "many", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["made_by"]
    assert made["params"]["settings"] == "level=head, k=50"
    assert cutaway.open("many").items[0] == "L1.attn.z[2]"
    assert main(["rerun", "many"]) == 0
    capsys.readouterr()
    assert main([*words[:-1], "none.csv"]) == 2
    assert capsys.readouterr().err.startswith("error: prompts 'none.csv': there is no such file, and no suite")
    assert main([*words, "--settings", "level=heads"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_cases_have_one_text_form() -> None:
    record = aggregate.method  # type: ignore[attr-defined]
    form = record.parameters["prompts"].form
    given = form.accept(["one", {"prompt": "two", "target": " x"}])
    assert form.parse(form.text(given)) == given == cases_of(["one", {"prompt": "two", "target": " x"}], "")
    settings = record.parameters["settings"].form
    assert settings.parse(settings.text(settings.accept({"a": "x, y", "b": True}))) == (("a", "x, y"), ("b", "true"))
    with pytest.raises(ValueError, match="sets nothing"):
        settings.parse("level")
