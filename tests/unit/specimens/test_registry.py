"""Names, cards and checked folders; and what a user reads when something is wrong."""

import json
import shutil

import pytest

from cutaway import specimens
from cutaway.core.errors import LoadError, WeightsError
from cutaway.specimens import registry


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A copy of one specimen, free to be damaged."""
    shutil.copytree(registry.HERE / "planted-llama", tmp_path / "planted-llama")
    monkeypatch.setattr(registry, "HERE", tmp_path)
    return tmp_path / "planted-llama"


def test_every_card_belongs_to_its_folder():
    for name in specimens.names():
        card = specimens.card(name)
        folder = specimens.path(name)
        assert card.name == folder.name == name
        assert card.size == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        assert card.examples
        assert card.accuracies


def test_all_together_stay_small():
    total = sum(f.stat().st_size for name in specimens.names() for f in specimens.path(name).iterdir())
    assert total <= 25_000_000


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(LoadError, match=r"specimen 'planted-lama': there is none .* 'planted-llama'"):
        specimens.path("planted-lama")


def test_a_far_name_gets_the_list():
    with pytest.raises(LoadError, match=r"the specimens are .*planted-gpt2"):
        specimens.card("zzzzzz")


def test_a_changed_weight_is_refused(shelf):
    weights = shelf / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(WeightsError, match=r"model\.safetensors has sha256 \w{12}, its card says \w{12}; install"):
        specimens.path("planted-llama")


def test_a_missing_weight_is_refused(shelf):
    (shelf / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"its file model\.safetensors is missing"):
        specimens.path("planted-llama")


@pytest.mark.parametrize("text", ["{", json.dumps({"name": "planted-llama"})])
def test_a_damaged_card_is_refused(shelf, text):
    (shelf / "card.json").write_text(text)
    with pytest.raises(WeightsError, match="its card is damaged"):
        specimens.card("planted-llama")


def test_a_card_survives_saving(tmp_path, monkeypatch):
    card = specimens.card("planted-gpt2")
    (tmp_path / "planted-gpt2").mkdir()
    card.save(tmp_path / "planted-gpt2")
    monkeypatch.setattr(registry, "HERE", tmp_path)
    assert specimens.card("planted-gpt2") == card
