from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import cutaway
from cutaway import catalog
from cutaway.core.errors import LoadError, MethodError, ParameterError, ResultError, UnknownMethodError
from cutaway.results import Grid
from tests.unit.cli.fakes import GLANCE, STARE, StubModel, install, install_loader

SOURCES = {
    "see/glance.py": GLANCE,
    "prove/stare/__init__.py": STARE,
    "see/_shared.py": GLANCE.replace("glance", "_shared"),
    "see/parts.py": "def parts() -> None:\n    '''No method.'''\n",
    "elsewhere/lost.py": GLANCE.replace("glance", "lost"),
}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    install(tmp_path, monkeypatch, "catalogued", SOURCES)
    return install_loader(monkeypatch)


@pytest.mark.usefixtures("fake")
def test_methods_are_found_where_they_lie_and_listed_without_being_imported() -> None:
    heads = catalog.headlines()
    assert list(heads) == ["glance", "stare"]
    assert heads["glance"] == ("glance", "see", "Layer numbers, scaled.", "catalogued.see.glance")
    assert heads["stare"].stage == "prove"
    assert "catalogued.see.glance" not in sys.modules
    assert list(catalog.methods()) == ["glance", "stare"]
    assert catalog.get("stare").stage == "prove"
    assert catalog.get("stare").summary == heads["stare"].summary


@pytest.mark.usefixtures("fake")
def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UnknownMethodError, match=r"'glanse': there is none .* did you mean 'glance'\?"):
        catalog.run("glanse", StubModel())  # type: ignore[arg-type]


def test_two_methods_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "doubled", {"see/glance.py": GLANCE, "prove/glance.py": GLANCE})
    with pytest.raises(MethodError, match=r"two have this name: doubled\.see\.glance and doubled\.prove\.glance"):
        catalog.headlines()


def test_no_methods_at_all_are_an_empty_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "PACKAGE", "cutaway_of_nothing")
    assert catalog.methods() == {}


def test_a_saved_result_is_made_again(tmp_path: Path, fake: list[dict[str, object]]) -> None:
    saved = catalog.run("glance", StubModel("there"), prompt=["a", "#1 #2"][:1], layers=[0, -1], scale=0.1)  # type: ignore[arg-type]
    saved.save(tmp_path / "saved")
    again = catalog.rerun(tmp_path / "saved")
    assert again.equal
    assert str(again) == "equal"
    assert again.result.made_by is not None
    assert saved.made_by is not None
    assert again.result.made_by.params == saved.made_by.params
    assert fake == [{"ref": "there", "dtype": "float32"}]
    assert cutaway.rerun is catalog.rerun


def doctored(folder: Path, **changes: object) -> Path:
    """The saved result with some of its provenance changed."""
    path = folder / "result.json"
    head = json.loads(path.read_text())
    head["made_by"] = None if changes == {"made_by": None} else head["made_by"] | changes
    path.write_text(json.dumps(head))
    return folder


@pytest.fixture
def saved(tmp_path: Path, fake: list[dict[str, object]]) -> Path:
    result = catalog.run("glance", StubModel("there"), prompt="cat", scale=0.5)  # type: ignore[arg-type]
    return result.save(tmp_path / "saved")


def test_a_difference_is_told_with_its_numbers(saved: Path) -> None:
    params = {"prompt": "cat", "scale": "0.5000001"}
    again = catalog.rerun(doctored(saved, params=params), rtol=0, atol=0)
    assert not again.equal
    assert "values: 3 of 4 differ" in str(again)
    assert catalog.rerun(saved).equal


def test_what_changed_around_the_numbers_is_noted(saved: Path) -> None:
    versions = {"torch": "0.1"}
    again = catalog.rerun(doctored(saved, device="cuda:3", versions=versions, inputs_digest="x"))
    assert again.equal
    notes = " | ".join(again.notes)
    assert "has changed since" in notes
    assert "device cuda:3 then, cpu now" in notes
    assert "torch 0.1 then" in notes
    assert "python None then" in notes


def test_rerun_refuses_what_it_cannot_repeat(saved: Path) -> None:
    with pytest.raises(ResultError, match="weights d0, the result came from dX"):
        catalog.rerun(doctored(saved, model_digest="dX"))
    with pytest.raises(LoadError, match=r"'nowhere' cannot be loaded .*made in memory has to be given again"):
        catalog.rerun(doctored(saved, model="nowhere"))
    with pytest.raises(ParameterError, match="made in memory"):
        catalog.rerun(doctored(saved, model="there", model_digest="d0", params={"prompt": "<in memory: inputs 1>"}))
    with pytest.raises(ParameterError, match="no parameter 'scael'; did you mean 'scale'"):
        catalog.rerun(doctored(saved, params={"prompt": "cat", "scael": "1"}))
    with pytest.raises(UnknownMethodError, match="'gone'"):
        catalog.rerun(doctored(saved, method="gone"))
    with pytest.raises(ResultError, match="does not say how it was made"):
        catalog.rerun(doctored(saved, made_by=None))


def test_a_result_in_hand_is_made_again_too(saved: Path) -> None:
    result = cutaway.open(saved)
    again = catalog.rerun(result)
    assert again.equal
    assert again.saved is result
    with pytest.raises(ResultError, match="opening a Grid: it is a result already; give the folder"):
        cutaway.open(result)  # type: ignore[arg-type]
    with pytest.raises(ResultError, match="opening a int: it names no folder"):
        catalog.rerun(3)  # type: ignore[arg-type]
    with pytest.raises(ResultError, match=r"opening 'nothere': there is no such folder or file; give a folder that"):
        catalog.rerun("nothere")
    with pytest.raises(ResultError, match="rerunning 'by hand': the result does not say how it was made"):
        catalog.rerun(Grid(values=[[1.0]], axes=("layer", "head"), title="by hand"))


def test_a_model_made_in_memory_is_given_again(saved: Path) -> None:
    again = catalog.rerun(doctored(saved, model="nowhere"), StubModel())  # type: ignore[arg-type]
    assert again.equal
    assert isinstance(again.result, Grid)


def test_listing_the_methods_imports_no_heavy_library() -> None:
    program = "import sys; from cutaway import catalog; catalog.headlines(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "pandas", "pydantic"} & set(run.stdout.split())
