"""Results as values: what goes in, what is equal, and what is on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cutaway.core.errors import ResultError
from cutaway.core.result_file import ARRAYS, JSON, SCHEMA
from cutaway.results import Check, Grid, Provenance, Ranking, Result, Series, Table, open_result


def grid(**more: object) -> Grid:
    return Grid(values=np.arange(6.0).reshape(2, 3), axes=("layer", "head"), **more)


# What goes in


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True), np.float32),
        (torch.ones(2, 3, dtype=torch.float16), np.float32),
        (torch.ones(2, 3, dtype=torch.float64), np.float64),
        (torch.ones(2, 3, dtype=torch.int32), np.int64),
        (np.ones((2, 3), np.float16), np.float32),
        (np.ones((3, 2), ">f8").T, np.float64),
        ([[1, 2, 3], [4, 5, 6]], np.int64),
        (np.ones((2, 3), bool), bool),
    ],
)
def test_numbers_become_stored_dtypes(given: object, dtype: type) -> None:
    values = Grid(values=given, axes=("layer", "head")).values
    assert values.dtype == dtype
    assert values.flags.c_contiguous
    assert not values.flags.writeable


def test_arrays_are_copied_in() -> None:
    ours = np.zeros((1, 1))
    tensor = torch.zeros(1, 1)
    kept = Grid(values=ours, axes=("a", "b")), Grid(values=tensor, axes=("a", "b"))
    ours[0, 0] = tensor[0, 0] = 7.0
    assert [float(each.values[0, 0]) for each in kept] == [0.0, 0.0]


def test_a_result_cannot_be_changed() -> None:
    result = grid()
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.title = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        result.values[0, 0] = 1
    assert result.replace(title="other").title == "other"
    assert result.title == ""


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Grid(values=np.zeros(3), axes=("layer", "head")), r"shape \(3,\), its dimensions are \(layer, head\)"),
        (lambda: grid(labels={"head": ("a", "b")}), "2 labels for 3 places"),
        (lambda: grid(labels={"hed": ("a",)}), "did you mean 'head'"),
        (lambda: grid(labels={"head": (0.0, float("nan"), 1.0)}), "strings or finite numbers"),
        (lambda: grid(labels={"head": (True, False, True)}), "strings or finite numbers"),
        (lambda: Grid(values=np.zeros((1, 1), complex), axes=("a", "b")), "complex128"),
        (lambda: Grid(values=[[1.0], [1.0, 2.0]], axes=("a", "b")), "not rectangular"),
        (lambda: Ranking(items=["a", 1], scores=[1.0, 2.0]), "mixture"),
        (lambda: Ranking(items=["a"], scores=[1.0, 2.0]), "has 2 along 'item', another array 1"),
        (lambda: grid().along("layr"), "did you mean 'layer'"),
    ],
)
def test_arrays_that_do_not_line_up_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ResultError, match=said):
        make()


def test_labels_default_to_places() -> None:
    assert grid(labels={"layer": (4, 9)}).along("layer") == (4, 9)
    assert grid().along("head") == (0, 1, 2)


def test_every_kind_keeps_the_equality_of_results() -> None:
    for kind in Result.kinds.values():
        assert kind.__eq__ is Result.__eq__
        assert kind.__repr__ is Result.__repr__


# What is equal


def test_same_as_says_what_differs_and_by_how_much() -> None:
    first = grid()
    second = first.replace(values=first.values + np.array([[0, 0, 0], [0, 0.5, 1e-9]]))
    difference = first.same_as(second)
    assert difference
    assert difference.largest == {"values": 0.5}
    assert str(difference) == "values: 1 of 6 differ, largest by 0.5 (at layer 1, head 1: 4.0 against 4.5)"
    assert not first.same_as(second, atol=0.5)
    assert not first.same_as(second, rtol=0.125)


def test_same_as_knows_nan_and_infinity() -> None:
    values = np.array([[np.nan, np.inf, -np.inf]])
    first = Grid(values=values, axes=("a", "b"))
    assert not first.same_as(first.replace(values=values.copy()), 0, 0)
    for other in ([[0.0, np.inf, -np.inf]], [[np.nan, -np.inf, -np.inf]], [[np.nan, np.inf, np.nan]]):
        assert first.same_as(first.replace(values=other), 1e9, 1e9)


def test_where_and_when_do_not_count_for_same_as_but_for_equality() -> None:
    first = grid(made_by=Provenance(method="patch", seconds=1.0))
    second = first.replace(made_by=Provenance(method="patch", seconds=2.0))
    assert not first.same_as(second)
    assert first != second
    assert first == first.replace()
    assert first != "a grid"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"title": "other"}, "title: '' against 'other'"),
        ({"labels": {"head": ("a", "b", "c")}}, "labels"),
        ({"center": float("nan")}, "center: 0.0 against nan"),
        ({"check": Check(name="sum", value=0.0, tolerance=1.0)}, "check: None against"),
        ({"values": np.zeros((3, 3))}, r"values: float64\[2, 3\] against float64\[3, 3\]"),
        ({"values": np.zeros((2, 3), np.float32)}, "float32"),
    ],
)
def test_settings_labels_and_evidence_are_compared(change: dict[str, object], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        assert not grid().same_as(grid().replace(**change)), str(grid().same_as(grid().replace(**change)))


def test_another_kind_differs() -> None:
    assert str(grid().same_as(Table())) == "one is a grid, the other a table"


def test_a_check_that_stops_holding_is_a_difference() -> None:
    holds, fails = (grid(check=Check(name="sum", value=value, tolerance=1e-5)) for value in (9e-6, 1.1e-5))
    assert "check holds: True against False" in str(holds.same_as(fails, atol=1e-3))


# What is on disk


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    values = np.array([[np.nan, np.inf, -np.inf, -0.0, 5e-324, 0.1]])
    result = Grid(
        values=values,
        axes=("a", "b"),
        labels={"b": ("x", "\n", "\x00", "\ud800", "שלום", "")},
        made_by=Provenance(method="m", params={"p": "a\n'b'"}, seconds=0.1 + 0.2),
        check=Check(name="c", value=float("nan"), tolerance=float("inf")),
        notes=("one", "two"),
        center=float("-inf"),
    )
    for path in (result.save(tmp_path / "folder"), result.write(tmp_path / "file.json")):
        opened = open_result(path)
        assert opened == result
        assert opened.arrays()["values"].tobytes() == values.tobytes()
        assert opened.made_by == result.made_by


def test_a_saved_result_is_text_and_safetensors_only(tmp_path: Path) -> None:
    folder = grid().save(tmp_path / "r")
    assert sorted(each.name for each in folder.iterdir()) == [ARRAYS, JSON]
    head = json.loads((folder / JSON).read_text())
    assert (head["cutaway_result"], head["kind"]) == (SCHEMA, "grid")
    assert head["arrays"]["values"] == {"dims": ["layer", "head"], "dtype": "float64", "shape": [2, 3]}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["r"]


def test_saving_never_buries_anything(tmp_path: Path) -> None:
    folder = grid().save(tmp_path / "r")
    with pytest.raises(ResultError, match="overwrite=True"):
        grid().save(folder)
    assert open_result(grid(title="new").save(folder, overwrite=True)).title == "new"
    (folder / "report.html").write_text("mine")
    with pytest.raises(ResultError, match=r"also holds report\.html"):
        grid().save(folder, overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ResultError, match="a file of that name"):
        grid().save(tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    assert open_result(grid().save(tmp_path / "empty")) == grid()


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failed_save_leaves_the_old_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    folder = grid(title="old").save(tmp_path / "r")
    rename, calls = os.rename, []

    def failing(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(ResultError, match="No space left on device"):
        grid(title="new").save(folder, overwrite=True)
    assert open_result(folder).title == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["r"]


def test_a_killed_save_loses_nothing(tmp_path: Path) -> None:
    folder = grid(title="old").save(tmp_path / "r")
    script = (
        "import os, sys; from cutaway.results import open_result\n"
        "rename, calls = os.rename, []\n"
        "def dying(a, b):\n"
        "    calls.append(a)\n"
        "    os._exit(9) if len(calls) == 2 else rename(a, b)\n"
        "os.rename = dying\n"
        "open_result(sys.argv[1]).replace(title='new').save(sys.argv[1], overwrite=True)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(folder)], check=False).returncode == 9
    with pytest.raises(ResultError, match=r"interrupted save left the result in '.*\.r\.previous'"):
        open_result(folder)
    assert open_result(tmp_path / ".r.previous").title == "old"


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        head = json.loads((folder / JSON).read_text())
        change(head)
        (folder / JSON).write_text(json.dumps(head))

    return apply


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: (f / JSON).unlink(), r"holds arrays\.safetensors and no result\.json"),
        (lambda f: (f / JSON).write_bytes((f / JSON).read_bytes()[:40]), r"result\.json is damaged or not JSON"),
        (lambda f: (f / JSON).write_bytes(b"\xff\xfe"), r"result\.json is damaged or not JSON"),
        (lambda f: (f / JSON).write_text("[" * 100_000), r"result\.json is damaged or not JSON"),
        (lambda f: (f / JSON).write_text("[]"), "not a Cutaway result"),
        (edit(lambda h: h.update(cutaway_result=SCHEMA + 1)), "upgrade Cutaway"),
        (edit(lambda h: h.update(kind="gird")), "kind 'gird'; did you mean 'grid'"),
        (edit(lambda h: h.pop("fields")), r"result\.json is damaged \(KeyError"),
        (edit(lambda h: h["fields"].update(extra=1)), r"result\.json is damaged \(TypeError"),
        (
            edit(lambda h: h["arrays"]["values"].update(shape=[3, 2])),
            r"damaged \(ValueError: values is float64\[2, 3\]",
        ),
        (edit(lambda h: h["arrays"]["values"].update(dtype="float32")), "not float32"),
        (edit(lambda h: h["fields"].update(axes=["layer"])), r"damaged \(ResultError"),
        (edit(lambda h: h.update(made_by={"method": "m", "surprise": 1})), "damaged"),
        (lambda f: (f / ARRAYS).unlink(), r"arrays\.safetensors is missing"),
        (lambda f: (f / ARRAYS).write_bytes((f / ARRAYS).read_bytes()[:-1]), "checksum differs"),
        (lambda f: (f / ARRAYS).write_bytes(b""), "checksum differs"),
        (lambda f: (f / JSON).write_bytes(b"\x89PNG"), r"result\.json is damaged or not JSON \(it is no text\)"),
    ],
)
def test_damage_is_one_clear_sentence(tmp_path: Path, harm: Callable[[Path], object], said: str) -> None:
    folder = grid().save(tmp_path / "r")
    harm(folder)
    with pytest.raises(ResultError, match=said) as caught:
        open_result(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_graphs_are_written_in_the_forms_of_others(tmp_path: Path) -> None:
    for name in ("a.circuit.json", "a.attribution.json", "a.pt"):
        with pytest.raises(ResultError, match="a grid has no such form; only graphs have it"):
            grid().write(tmp_path / name)
    (tmp_path / "theirs.circuit.json").write_text('{"cfg": {}, "edges": {}}')
    with pytest.raises(ResultError, match="is not a Cutaway result; 'cutaway convert' reads circuits and graphs"):
        open_result(tmp_path / "theirs.circuit.json")
    assert [each.name for each in tmp_path.iterdir()] == ["theirs.circuit.json"]


def test_opening_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no such folder or file"):
        open_result(tmp_path / "missing")
    with pytest.raises(ResultError, match="holds nothing"):
        open_result(tmp_path)


def test_results_import_nothing_heavy() -> None:
    heavy = "transformers pandas altair xarray vl_convert rich scipy PIL networkx"
    script = f"import sys, cutaway.results; print(*[m for m in '{heavy}'.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_provenance_is_code_that_reruns() -> None:
    made = Provenance(method="patch", model="town", params={"clean": "a", "k": "3"})
    assert made.code() == "cutaway.run('patch', cutaway.load('town'),\n    clean='a',\n    k='3')"


def test_series_of_a_tensor(tmp_path: Path) -> None:
    series = Series(x=torch.arange(3), y=torch.rand(2, 3, dtype=torch.bfloat16))
    assert open_result(series.save(tmp_path / "s")) == series
