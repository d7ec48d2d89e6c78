from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from cutaway import catalog
from cutaway.cli import main
from cutaway.cli.app import FIXED
from cutaway.cli.options import SHARED, spelled_out
from cutaway.cli.output import show_json
from cutaway.core.errors import InputError, MethodError
from cutaway.core.result_file import open_result
from cutaway.results.table import Table
from tests.unit.cli.fakes import GLANCE, WORDS, install

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "cli"
Ask = list[dict[str, Any]]


def params_of(out: str) -> dict[str, str]:
    """The parameters that a result printed with --json was made with."""
    return json.loads(out)["made_by"]["params"]


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(("words", "name"), [(["--help"], "help"), ([], "help"), (["glance", "--help"], "help-glance")])
def test_help_is_as_it_was(words: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines()) + "\n"
    assert printed == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_a_method_prints_its_summary_and_nothing_else(asked: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["glance", "here", "--prompt", "cat", "--dtype", "bfloat16", "--revision", "v1", "--trust-pickle"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("glance plain\n")
    assert captured.err == ""
    options = {"dtype": "bfloat16", "device": None, "revision": "v1", "trust_pickle": True}
    assert asked == [{"ref": "here", **options}]


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("typed", "recorded"),
    [
        (["--prompt", "-x --y"], {"prompt": "-x --y"}),
        (["--prompt=--json"], {"prompt": "--json"}),
        (["--prompt", ""], {"prompt": ""}),
        (["--prompt", "#1 #2"], {"prompt": "#1 #2"}),
        (["--prompt", "a", "--prompt", " b,"], {"prompt": '["a", " b,"]'}),
        (["--prompt", '["a", "b"]'], {"prompt": '["a", "b"]'}),
        (["--prompt", "\\@x"], {"prompt": "@x"}),
        (["--prompt", "\\x"], {"prompt": "\\x"}),
        (["--prompt", "a", "--layers", "-1"], {"layers": "-1"}),
        (["--layers", "-2--1", "--prompt", "a"], {"layers": "-2--1"}),
        (["--prompt", "a", "--scale", "-1.5e-3"], {"scale": "-0.0015"}),
        (["--prompt", "a", "--sites", "L-1.mlp.out@-1"], {"sites": "L-1.mlp.out@-1"}),
        (["--prompt", "a", "--metric", 'logit_diff: " Paris", #22 @-1'], {"metric": 'logit_diff: " Paris", #22 @-1'}),
        (["--prompt", "a", "--no-centre"], {"centre": "false"}),
        (["--prompt", "a", "--centre"], {"centre": "true"}),
        (["--prompt", "a", "--target", "#3"], {"target": "#3"}),
        *[(["--prompt", "a", "--target", word], {"target": word}) for word in WORDS],
    ],
)
def test_what_is_typed_is_what_is_recorded(
    typed: list[str], recorded: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["glance", "here", *typed, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert params_of(captured.out).items() >= recorded.items()


@pytest.mark.usefixtures("asked")
def test_what_the_shell_hands_over_survives() -> None:
    """The words that a real shell makes of a line, in a process of its own."""
    echo = "import sys, json; print(json.dumps(sys.argv[1:]))"
    line = f"""{sys.executable} -c '{echo}' --target " Paris" --layers -1 --prompt=$'\\n' --metric 'logit: "a b"'"""
    words = json.loads(subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout)
    record = catalog.get("glance")
    assert words == ["--target", " Paris", "--layers", "-1", "--prompt=\n", "--metric", 'logit: "a b"']
    assert record.texts(record.bind((), {"prompt": "\n", "target": words[1]}))["target"] == " Paris"


@pytest.mark.usefixtures("asked")
def test_prompts_are_read_from_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.txt").write_text("cat\n\n dog \n#1 #2\n".replace("#1 #2\n", "é\n"), encoding="utf-8")
    assert main(["glance", "here", "--prompt", "@p.txt", "--prompt", "more", "--json"]) == 0
    assert params_of(capsys.readouterr().out)["prompt"] == '["cat", " dog ", "é", "more"]'
    assert main(["stare", "here", "--prompt", "@p.txt", "--json"]) == 0
    assert params_of(capsys.readouterr().out)["prompt"] == "cat\n\n dog \né"


@pytest.mark.usefixtures("asked")
def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(name: str) -> None:
        raise ValueError(name)

    assert main(["stare", "here", "--prompt", "cat", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["arrays"]["values"]["data"] == [{"float": "nan"}, 1.0]
    show_json({"a": [float("nan"), float("inf"), 1.5], "b": (None, True, "é", 3), "c": Path("x")})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5], "b": [None, True, "é", 3], "c": "x"}


@pytest.mark.usefixtures("asked")
def test_results_are_written_opened_and_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    suffixes = (".html", ".svg", ".png", ".json", ".csv")
    targets = [word for suffix in suffixes for word in ("--out", f"r{suffix}")]
    assert main(["glance", "here", "--prompt", "cat", "--out", "saved", *targets]) == 0
    captured = capsys.readouterr()
    assert [line.split("/")[-1] for line in captured.err.splitlines()] == ["saved", *(f"wrote r{s}" for s in suffixes)]
    assert all(Path(f"r{suffix}").stat().st_size > 0 for suffix in suffixes)
    assert open_result("saved") == open_result("r.json")
    printed = captured.out

    assert main(["open", "saved"]) == 0
    assert capsys.readouterr().out == printed
    assert main(["open", "saved", "--out", "again.csv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "grid"
    assert Path("again.csv").read_text() == Path("r.csv").read_text()

    assert main(["rerun", "saved"]) == 0
    assert capsys.readouterr().out == "equal\n"
    head = json.loads(Path("saved/result.json").read_text())
    head["made_by"]["params"]["scale"] = "2.0"
    Path("saved/result.json").write_text(json.dumps(head))
    assert main(["rerun", "saved", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is False
    assert "3 of 4 differ" in found["differences"][0]
    assert main(["rerun", "saved", "--atol", "10", "--model", "elsewhere"]) == 0


def test_a_place_that_cannot_be_written_is_known_before_the_run(asked: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["glance", "here", "--prompt", "cat", "--out", "a.pdf"]) == 1
    assert "no writer for '.pdf'" in capsys.readouterr().err
    assert main(["glance", "here", "--prompt", "cat", "--out", "a.circuit.json"]) == 1
    assert "what comes out is a Grid, and only graphs have that form" in capsys.readouterr().err
    Path("taken").mkdir()
    Path("taken/x").touch()
    assert main(["glance", "here", "--prompt", "cat", "--out", "taken"]) == 1
    assert "add --overwrite" in capsys.readouterr().err
    assert asked == []
    assert main(["glance", "here", "--prompt", "cat", "--out", "saved"]) == 0
    assert main(["glance", "here", "--prompt", "dog", "--out", "saved"]) == 1
    assert main(["glance", "here", "--prompt", "dog", "--out", "saved", "--overwrite"]) == 0
    made = open_result("saved").made_by
    assert made is not None
    assert made.params["prompt"] == "dog"


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["glance", "here"], 2, "error: Missing option '--prompt'."),
        (["glance"], 2, "error: Missing argument 'MODEL'."),
        (["glance", "here", "--promt", "a"], 2, "error: No such option: --promt (Possible options: "),
        (["glanse"], 2, "error: No such command 'glanse'. Did you mean 'glance'?"),
        (["glance", "here", "--prompt", "a", "--k", "0"], 2, "error: parameter 'k' = '0' of glance: it should be"),
        (["glance", "here", "--prompt", "a", "--target", "nope"], 2, "error: token 'nope': it is none"),
        (["glance", "here", "--prompt", "a", "--sites", "L3.foo"], 2, "error: site 'L3.foo': there is no kind 'foo'"),
        (["glance", "here", "--prompt", "@none.txt"], 2, "error: the file of '@none.txt': it cannot be read"),
        (["glance", "nowhere", "--prompt", "a"], 2, "error: model 'nowhere': there is none of that name."),
        (["open", "none"], 1, "error: opening 'none': there is no such folder or file; give a folder"),
        (["rerun", "none"], 1, "error: opening 'none'"),
        (["specimen", "show", "none"], 2, "error: "),
        (["doctor"], 2, "error: Invalid value: give a MODEL, or --architectures"),
        (["doctor", "here", "--architectures"], 2, "error: Invalid value: give a MODEL, or --architectures"),
        (["stare", "here", "--prompt", "a", "--fail", "oh"], 70, "error: ZeroDivisionError: oh and more; run with --t"),
        (["stare", "here", "--prompt", "a", "--fail", "interrupt"], 130, "error: interrupted"),
    ],
)
def test_errors_are_one_line_on_stderr_and_an_exit_code(
    words: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(sentence)
    assert captured.err.count("\n") == 1


@pytest.mark.usefixtures("asked")
def test_traceback_shows_where_an_error_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stare", "here", "--prompt", "a", "--fail", "oh", "--traceback"]) == 70
    err = capsys.readouterr().err
    assert 'stare.py", line' in err
    assert err.splitlines()[-1].startswith("error: ZeroDivisionError: oh")


@pytest.mark.usefixtures("asked")
def test_an_empty_file_of_prompts_is_refused() -> None:
    Path("empty.txt").write_text("\n")
    with pytest.raises(InputError, match="it is empty"):
        catalog_words("@empty.txt")
    Path("bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="cannot be read"):
        catalog_words("@bad.txt")


def catalog_words(word: str) -> Any:
    from cutaway.cli.method_command import text_of

    return text_of(catalog.get("glance").parameters["prompt"].form, [word])


def test_a_parameter_named_like_a_common_option_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cutaway.cli.method_command import function_of

    source = GLANCE.replace("def glance", "def clash").replace("seed: int", "device: int")
    install(tmp_path, monkeypatch, "clashing", {"see/clash.py": source})
    with pytest.raises(MethodError, match="every command has an option 'device'"):
        function_of(catalog.get("clash"))


@pytest.mark.parametrize("name", [name for commands in FIXED.values() for name in commands])
def test_an_option_that_several_commands_have_is_the_same_in_each(name: str) -> None:
    command = next(commands[name] for commands in FIXED.values() if name in commands)
    spelled = inspect.signature(spelled_out(command)).parameters
    assert {"loading", "delivery"}.isdisjoint(spelled)
    for option in spelled.keys() & SHARED.keys():
        assert (spelled[option].annotation, spelled[option].default) == SHARED[option]
    own = inspect.signature(command).parameters
    assert own.keys() & SHARED.keys() <= {"json"}
    assert ("dtype" in spelled) == ("loading" in own)
    assert ("out" in spelled) == ("delivery" in own)


@pytest.mark.usefixtures("asked")
def test_lists_of_methods_specimens_and_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)
    assert [(each["method"], each["stage"]) for each in methods] == [("glance", "see"), ("stare", "prove")]
    assert main(["methods"]) == 0
    printed = capsys.readouterr()
    assert "Layer numbers, scaled." in printed.out
    assert "explain, aggregate; on saved results: open, rerun, circuit, convert" in printed.err
    assert main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"python", "cutaway", "torch", "transformers", "numpy"}
    assert main(["specimens", "--json"]) == 0
    names = [each["specimen"] for each in json.loads(capsys.readouterr().out)]
    assert names
    assert main(["specimen", "show", names[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == names[0]
    assert main(["specimen", "show", names[0]]) == 0
    assert names[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "module", "function"),
    [
        (["sites", "here"], "cutaway.models.sites", "site_table"),
        (["doctor", "here"], "cutaway.models.doctor", "doctor"),
    ],
)
def test_tables_are_printed_whole_and_written(
    command: list[str],
    module: str,
    function: str,
    asked: Ask,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import cutaway.models

    rows = 40
    columns = {
        "site": [f"L{i}.attn.z[5]" for i in range(rows)],
        "error": [float("nan")] * rows,
        "holds": ["yes"] * rows,
    }
    shown = Table(title="the title", columns=columns, notes=("refused: some [odd] thing",))
    stand_in = types.ModuleType(module)
    setattr(stand_in, function, lambda *model: shown)
    monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setattr(cutaway.models, module.rpartition(".")[2], stand_in, raising=False)
    assert main([*command, "--out", "t.csv"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "the title"
    assert all(lines[2 + i].startswith(f"L{i}.attn.z[5]") for i in range(rows))
    assert lines[-1] == "refused: some [odd] thing"
    assert captured.err == "wrote t.csv\n"
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1] == {"site": "L1.attn.z[5]", "error": None, "holds": "yes"}
    assert len(asked) == 2


@pytest.mark.usefixtures("asked")
def test_a_model_that_fails_its_examination_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = types.ModuleType("cutaway.models.doctor")
    stand_in.doctor = lambda model: Table(columns={"claim": ["a", "b"], "holds": ["yes", "NO"]})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    assert main(["doctor", "here"]) == 1
    assert "NO" in capsys.readouterr().out


class Verdict:
    def __init__(self, name: str) -> None:
        self.name = name

    def as_json(self) -> dict[str, Any]:
        refused = {"attn.q": "no [such] thing", "attn.k": "too"}
        return {"class": self.name, "task": "causal-lm", "status": "partly", "refused": refused, "error": ""}


@pytest.mark.usefixtures("asked")
def test_the_survey_of_architectures_is_a_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = types.ModuleType("cutaway.models.support")
    stand_in.survey = lambda: [Verdict("A"), Verdict("B")]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    assert main(["doctor", "--architectures", "--json", "--out", "new/a.json", "--out", "a.csv"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path("new/a.json").read_text()) == [Verdict("A").as_json(), Verdict("B").as_json()]
    assert "attn.q: no [such] thing; attn.k: too" in Path("a.csv").read_text()
    assert main(["doctor", "--architectures"]) == 0
    assert "attn.q: no [such] thing; attn.k: too" in capsys.readouterr().out


def test_help_imports_no_heavy_library() -> None:
    program = "import sys; from cutaway.cli import main; main(['--help']); print(*sys.modules)"
    environment = os.environ | {"COLUMNS": "100"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert "Usage: cutaway" in run.stdout
    assert not {"torch", "transformers", "pandas", "pydantic"} & set(run.stdout.split())


def test_the_module_is_the_command() -> None:
    run = subprocess.run([sys.executable, "-m", "cutaway", "nothing"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "error: No such command 'nothing'.\n"
