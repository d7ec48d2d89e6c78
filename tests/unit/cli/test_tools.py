from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from cutaway import catalog
from tests.unit.cli.fakes import GLANCE, STARE, install
from tools import docs_from_code, make_pictures, new_method


def test_a_new_method_is_three_files_that_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert new_method.main(["my_thing", "--stage", "locate"], tmp_path) == 0
    method, test, page = (tmp_path / path for path in new_method.files("my_thing", "locate"))
    compile(test.read_text(), str(test), "exec")
    monkeypatch.syspath_prepend(str(method.parents[4]))
    record = new_method.record("my_thing", "locate", method)
    assert (record.name, record.stage, record.example) == ("my_thing", "locate", {"prompt": "#1 #2 #3"})
    assert docs_from_code.block("my_thing", docs_from_code.method_block(record)) in page.read_text()
    called = {node.value for node in ast.walk(ast.parse(test.read_text())) if isinstance(node, ast.Constant)}
    assert "my_thing" in called


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["my_thing", "--stage", "prove"], "docs/methods/my_thing.md exists: nothing is overwritten"),
        (["my_thing", "--stage", "sea"], "there is no stage 'sea': the stages are see, locate"),
        (["MyThing", "--stage", "see"], "'MyThing' is no name for a function"),
        (["class", "--stage", "see"], "'class' is no name for a function"),
        (["glance", "--stage", "see"], "there is a method 'glance' already, in starting.see.glance"),
    ],
)
def test_what_cannot_be_started_is_refused_and_nothing_is_written(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(tmp_path, monkeypatch, "starting", {"see/glance.py": GLANCE})
    taken = tmp_path / "docs/methods/my_thing.md"
    taken.parent.mkdir(parents=True)
    taken.write_text("mine")
    assert new_method.main(words, tmp_path) == 2
    assert sentence in capsys.readouterr().err
    assert taken.read_text() == "mine"
    assert not (tmp_path / "src").exists()


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(catalog, "COMPOSED", {})
    install(tmp_path, monkeypatch, "documented", {"see/glance.py": GLANCE, "prove/stare.py": STARE})
    folder = tmp_path / "docs"
    for name in ("glance", "stare"):
        (folder / "methods").mkdir(parents=True, exist_ok=True)
        (folder / f"methods/{name}.md").write_text(f"# {name}\n\n{docs_from_code.block(name, 'old')}\n\nMore.\n")
    return folder


def test_pages_are_brought_into_step_and_what_is_theirs_stays(docs: Path) -> None:
    stale = docs_from_code.problems(docs)
    assert [line for line in stale if "differs from the code" in line] == [
        "docs/methods/glance.md: differs from the code; run 'make docs'",
        "docs/methods/stare.md: differs from the code; run 'make docs'",
    ]
    docs_from_code.problems(docs, write=True)
    assert docs_from_code.problems(docs) == [
        "glance: its docstring's Args say nothing of target, sites, metric, k, how, centre, seed"
    ]
    page = (docs / "methods/glance.md").read_text()
    assert page.startswith("# glance\n\n<!-- generated: method glance -->\n\nLayer numbers, scaled.\n")
    assert page.endswith("<!-- end of method glance -->\n\nMore.\n")
    assert "\nold\n" not in page


def test_missing_pages_and_blocks_are_reported(docs: Path) -> None:
    (docs / "methods/glance.md").unlink()
    (docs / "methods/stare.md").write_text("# stare\n")
    found = docs_from_code.problems(docs, write=True)
    assert "docs/methods/glance.md: there is no such page" in found
    assert "docs/methods/stare.md: it has no block 'method stare'" in found


@pytest.mark.usefixtures("docs")
def test_a_block_shows_the_command_and_every_parameter() -> None:
    record: Any = catalog.get("glance")
    text = docs_from_code.method_block(record)
    assert "$ cutaway glance MODEL \\\n    --prompt PROMPTS \\\n    [--target TOKEN] \\\n" in text
    assert "[--centre/--no-centre]" in text
    assert re.findall(r"^\| `(\w+)`", text, re.MULTILINE) == list(record.parameters)
    assert "| `scale` | a number | `1.0` | factor. |" in text
    assert docs_from_code.pages()["methods/glance.md"] == text
    assert docs_from_code.method_blocks()["method glance"]() == text


def test_every_picture_of_the_pages_is_drawn_by_the_tool_and_shown_on_a_page() -> None:
    root = make_pictures.PICTURES.parents[1]
    pages = "".join(page.read_text(encoding="utf-8") for page in [root / "README.md", *root.glob("docs/**/*.md")])
    assert {path.stem for path in make_pictures.PICTURES.iterdir()} == set(make_pictures.DRAWN)
    assert set(re.findall(r"pictures/(\w+)\.png", pages)) == set(make_pictures.DRAWN)
