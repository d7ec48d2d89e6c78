"""What every kind owes: a file that comes back equal, a table, a valid picture that is not blank, a safe page."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import cutaway.results
from cutaway.core.errors import ResultError
from cutaway.core.result_file import to_json
from cutaway.results import Kind, Result, open_result
from tests.unit.results.examples import EXAMPLES, TOKENS

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "results"
REGENERATE = "CUTAWAY_GOLDEN"  # CUTAWAY_GOLDEN=write makes the golden files anew; read the diff before committing it
SCREENFUL = 40

every_kind = pytest.mark.parametrize("name", list(EXAMPLES))


def test_every_kind_has_an_example() -> None:
    ours = {kind for kind, cls in Result.kinds.items() if cls.__module__.startswith(cutaway.results.__name__)}
    assert {each.kind for each in EXAMPLES.values()} == ours


@every_kind
def test_folder_and_json_file_come_back_exactly(name: str, tmp_path: Path) -> None:
    result = EXAMPLES[name]
    for opened in (open_result(result.save(tmp_path / "folder")), open_result(result.write(tmp_path / "file.json"))):
        assert opened == result
        assert type(opened) is type(result)
        assert to_json(opened) == to_json(result)
        for array, data in result.arrays().items():
            again = opened.arrays()[array]
            assert again.dtype == data.dtype
            if data.dtype != object:
                assert again.tobytes() == data.tobytes()


@every_kind
def test_arrays_cannot_be_written(name: str) -> None:
    for data in EXAMPLES[name].arrays().values():
        assert not data.flags.writeable


@every_kind
def test_equality_sees_every_array(name: str) -> None:
    result = EXAMPLES[name]
    for array, data in result.arrays().items():
        field, _, column = array.partition("/")
        changed = data.copy()
        place = tuple(np.argwhere(np.isfinite(data) if data.dtype.kind == "f" else np.ones(data.shape))[-1])
        if data.dtype == object:
            changed[place] = "something else"
        elif data.dtype == bool:
            changed[place] = not changed[place]
        else:
            changed[place] = (
                1 if array in ("source", "target") else changed[place] ^ 1 if array == "image" else changed[place] + 1
            )
        value = {**getattr(result, field), column: changed} if column else changed
        other = result.replace(**{field: value, **({"order": "given"} if result.kind == "ranking" else {})})
        difference = result.same_as(other)
        assert difference, array
        assert array in str(difference)


@every_kind
def test_picture_is_the_golden_one(name: str) -> None:
    path = GOLDEN / f"{name}.json"
    text = json.dumps(EXAMPLES[name].spec(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if os.environ.get(REGENERATE) == "write":
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


@every_kind
def test_altair_accepts_the_picture(name: str) -> None:
    spec, chart = EXAMPLES[name].spec(), EXAMPLES[name].view().to_dict()
    chart["config"]["view"] = spec["config"]["view"]  # altair adds its default sizes there
    assert chart["config"] == spec["config"]
    assert chart["title"] == spec["title"]
    assert spec["data"]["values"] in [chart["data"].get("values"), *chart.get("datasets", {}).values()]


@every_kind
def test_png_is_drawn(name: str, tmp_path: Path) -> None:
    path = EXAMPLES[name].write(tmp_path / "picture.png")
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert min(pixels.shape[:2]) > 50
    # Titles and numbers alone are a few shades; a picture has ink on at least one pixel of a hundred.
    assert (pixels != pixels[0, 0]).any(axis=-1).mean() > 0.01
    assert EXAMPLES[name].write(tmp_path / "picture.svg").read_text(encoding="utf-8").startswith("<svg")


@every_kind
def test_page_fetches_nothing_and_says_everything(name: str, tmp_path: Path) -> None:
    result = EXAMPLES[name]
    page = result.write(tmp_path / "page.html").read_text(encoding="utf-8")
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)  # what remains is ours; the library is inlined
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page)
    assert not re.search(r"@import|url\(|<link|<iframe|<img", markup)
    assert not re.search(r"\bimport\s*\(?\s*[\"']https?:", page)
    assert page.count("<script") == page.count("</script>") == 4
    assert "prefers-color-scheme" in page
    if result.made_by:
        assert "cutaway.run(&#x27;patch&#x27;" in page
    if result.check:
        assert result.check.name in page
    for note in result.notes:
        assert note in page


@every_kind
def test_text_of_tokens_cannot_become_markup(name: str, tmp_path: Path) -> None:
    page = EXAMPLES[name].write(tmp_path / "page.html").read_text(encoding="utf-8")
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "<b>" not in markup
    assert "<i>" not in markup


@every_kind
def test_notebook_gets_picture_text_and_table(name: str) -> None:
    bundle = EXAMPLES[name]._repr_mimebundle_()
    assert bundle["application/vnd.vegalite.v6.json"] == EXAMPLES[name].spec()
    assert bundle["text/plain"] == repr(EXAMPLES[name])
    still, found, rows = bundle["text/html"].partition("<table>")
    assert still.startswith('<img alt="" style="max-width:100%" src="data:image/png;base64,iVBOR')
    assert found
    assert rows.count("<tr>") == min(len(EXAMPLES[name].table()), 200, len(EXAMPLES[name].highlights())) + 1


@every_kind
def test_summary_fits_a_screen(name: str) -> None:
    result = EXAMPLES[name]
    console = Console(file=io.StringIO(), width=100)
    console.print(result)
    text = console.file.getvalue()
    assert len(text.splitlines()) <= SCREENFUL
    assert result.title in text
    for evidence in (result.check, result.proof):
        assert evidence is None or ("holds" in text if evidence is result.check else "more than" in text)


@every_kind
def test_table_xarray_and_csv_agree(name: str, tmp_path: Path) -> None:
    result = EXAMPLES[name]
    table, dataset = result.table(), result.to_xarray()
    assert len(table) > 0
    for array, data in result.arrays().items():
        labelled = dataset[array.rpartition("/")[2]]
        assert labelled.dims == result.dims()[array]
        assert labelled.shape == data.shape
    assert dataset.attrs["unit"] == result.unit
    header = result.write(tmp_path / "table.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == ",".join(table.columns)


def test_the_same_picture_twice() -> None:
    for result in EXAMPLES.values():
        assert json.dumps(result.spec()) == json.dumps(result.spec())


def test_a_suffix_without_a_writer_names_those_that_work(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"'\.gif'; use one of \.html, \.png, \.svg, \.json, \.csv"):
        EXAMPLES["grid"].write(tmp_path / "picture.gif")


def test_an_unknown_picture_option_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"'heads'.*a pattern has layer, head; did you mean 'head'"):
        EXAMPLES["pattern"].view(heads=3)
    with pytest.raises(ResultError, match="holds every number and no picture"):
        EXAMPLES["pattern"].write(tmp_path / "table.csv", head=0)


def test_an_option_names_a_label_not_an_index() -> None:
    assert "layer 3 · head 5" in EXAMPLES["pattern"].spec(layer=3, head=5)["title"]["subtitle"]
    with pytest.raises(ResultError, match="head=1: this pattern has 0, 5"):
        EXAMPLES["pattern"].spec(head=1)


def test_text_is_escaped_in_tables_and_visible() -> None:
    html = EXAMPLES["grid"]._repr_mimebundle_()["text/html"]
    assert "·&lt;/script&gt;&lt;b&gt;" in html
    assert "<td>⏎</td>" in html
    assert TOKENS[5] in html


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResultError, match="the disk refused"):
        EXAMPLES["grid"].write(tmp_path / "file" / "picture.json")


def test_picture_options_are_documented() -> None:
    page = (GOLDEN.parents[2] / "docs" / "concepts" / "results.md").read_text(encoding="utf-8")
    for result in EXAMPLES.values():
        assert isinstance(result, Kind)
        options = list(inspect.signature(result.spec).parameters)
        row = re.search(
            rf"^\| `{type(result).__name__}` \| (.*`.*`.*) \|$", page.partition("## Pictures")[2], re.MULTILINE
        )
        assert bool(row) == bool(options), result.kind
        for option in options:
            assert row
            assert re.search(rf"`{option}(=\w+)?`", row[1]), option
