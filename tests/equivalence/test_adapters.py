"""Merged adapters give the logits of peft, which runs them beside the weights; what is not merged is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cutaway
from cutaway import specimens
from cutaway.core.errors import CutawayError, LoadError, UnsupportedError, WeightsError
from cutaway.models.adapters import Adapter
from cutaway.models.source import Source
from tools.make_adapter_oracle import CASES, FOLDER
from tools.make_oracle import build, recipes


@pytest.mark.parametrize("name", CASES)
def test_merged_is_beside(name: str) -> None:
    model, ids = build(recipes()[CASES[name][0]])
    with torch.no_grad():
        before = model(ids).logits
        Adapter.read(Source(FOLDER / name, name)).merge(model, "base")
        after = model(ids).logits
    expected = load_file(FOLDER / name / "logits.safetensors")["logits"]
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=2e-5)
    assert float((before - after).abs().max()) > 0.05


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    model, _ = build(recipes()["llama"])
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def adapter(folder: Path, name: str = "dora", tensors: dict[str, torch.Tensor] | None = None, **settings: Any) -> Path:
    """A copy of a stored adapter with other settings or tensors."""
    shutil.copytree(FOLDER / name, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_a_base_and_an_adapter(llama: Path, tmp_path: Path) -> None:
    plus = f"{llama}+{adapter(tmp_path / 'tuned')}"
    model = cutaway.load(plus)
    _, ids = build(recipes()["llama"])
    expected = load_file(FOLDER / "dora" / "logits.safetensors")["logits"]
    torch.testing.assert_close(model(model.inputs(ids)), expected, rtol=1e-5, atol=2e-5)
    assert model.name == plus


def test_an_adapter_alone_names_its_base(llama: Path, tmp_path: Path) -> None:
    model = cutaway.load(adapter(tmp_path / "tuned", base_model_name_or_path=str(llama)))
    assert model.name == f"{llama}+{tmp_path / 'tuned'}"
    with pytest.raises(LoadError, match=r"an adapter of the/base: .*write BASE\+"):
        cutaway.load(adapter(tmp_path / "astray"))
    with pytest.raises(LoadError, match=r"does not name its base; write BASE\+"):
        cutaway.load(adapter(tmp_path / "unnamed", base_model_name_or_path=None))


def test_several_are_merged_one_after_the_other(llama: Path, tmp_path: Path) -> None:
    dora, whole = adapter(tmp_path / "one"), adapter(tmp_path / "two", "whole")
    both, one = (cutaway.load(ref) for ref in (f"{llama}+{dora}+{whole}", f"{llama}+{whole}"))
    _, ids = build(recipes()["llama"])
    alone = cutaway.load(f"{llama}+{dora}")
    found = [model(model.inputs(ids)) for model in (both, one, alone)]
    assert all(float((found[0] - other).abs().max()) > 0.01 for other in found[1:])


def test_a_folder_whose_name_holds_a_plus(llama: Path) -> None:
    shutil.copytree(llama, odd := llama.parent / "one+two")
    assert cutaway.load(str(odd)).name == str(odd)


def test_a_comparison_with_the_adapter_on(tmp_path: Path) -> None:
    """LoRA off against on: the one neuron whose column is switched off loses what it brought."""
    planted = cutaway.load("planted-gpt2")
    example = specimens.card("planted-gpt2").examples[0]
    first = cutaway.run("neuron_attribution", planted, prompt=example["prompt"], level="neuron", k=1, draws=0)
    layer, neuron = (int(n) for n in first.items[0].replace("L", "").replace("]", "").split(".mlp.act["))
    column = planted.hf.get_submodule(f"transformer.h.{layer}.mlp.c_proj").weight[neuron].detach()
    one_hot = torch.zeros(1, planted.hf.config.n_inner or 4 * len(column))
    one_hot[0, neuron] = 1.0
    path = f"base_model.model.transformer.h.{layer}.mlp.c_proj"
    tensors = {f"{path}.lora_A.weight": one_hot, f"{path}.lora_B.weight": -column[:, None].contiguous()}
    folder = adapter(tmp_path / "off", "lora", tensors, r=1, lora_alpha=1, alpha_pattern={}, rank_pattern={})
    found = cutaway.run(
        "compare_neurons", planted, prompts=example["prompt"], other=f"planted-gpt2+{folder}", k=3, draws=0
    )
    assert found.items[0] == first.items[0]
    assert float(found.scores[0]) == pytest.approx(float(first.scores[0]), rel=1e-4)


def refused(kind: type[CutawayError], base: Path | str, folder: Path | str, *words: str) -> None:
    with pytest.raises(kind) as caught:
        cutaway.load(f"{base}+{folder}")
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"init_lora_weights": "pissa"}, "changed the base model's own weights"),
        ({"target_parameters": ["experts.up"]}, "target_parameters"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_other_kinds_are_refused(llama: Path, tmp_path: Path, settings: dict[str, Any], word: str) -> None:
    refused(UnsupportedError, llama, adapter(tmp_path / "x", **settings), word)


def test_weights_that_do_not_fit(llama: Path, tmp_path: Path) -> None:
    stored = load_file(FOLDER / "dora" / "adapter_model.safetensors")
    lower = next(name for name in stored if "lora_A" in name)
    refused(
        WeightsError,
        llama,
        adapter(tmp_path / "wide", tensors=stored | {lower: torch.zeros(3, 5)}),
        "in the model",
    )
    refused(WeightsError, llama, adapter(tmp_path / "nan", tensors=stored | {lower: stored[lower] / 0}), "NaN")
    lone = {name: x for name, x in stored.items() if name != lower}
    refused(WeightsError, llama, adapter(tmp_path / "lone", tensors=lone), "has no lora_A")
    moved = {name.replace("q_proj", "queries"): x for name, x in stored.items()}
    refused(WeightsError, llama, adapter(tmp_path / "moved", tensors=moved), "no module", "self_attn")
    refused(WeightsError, llama, adapter(tmp_path / "empty", tensors={}), "holds nothing")
    refused(WeightsError, "planted-gpt2", adapter(tmp_path / "other"), "planted-gpt2 has no module")


def test_files_that_are_missing_or_damaged(llama: Path, tmp_path: Path) -> None:
    refused(LoadError, llama, tmp_path, "no adapter_config.json")
    refused(LoadError, llama, tmp_path / "nothere", "no such folder")
    refused(LoadError, llama, "", "one side of a '+' is empty")
    cut = adapter(tmp_path / "cut")
    (cut / "adapter_model.safetensors").write_bytes(b"short")
    refused(WeightsError, llama, cut, "damaged or cut short")
    (cut / "adapter_model.safetensors").unlink()
    (cut / "adapter_model.bin").write_bytes(b"")
    refused(WeightsError, llama, cut, "only a pickle")
    (cut / "adapter_config.json").write_text("[1]")
    refused(LoadError, llama, cut, "holds a list, not settings")


def test_a_weight_that_two_modules_share(tmp_path: Path) -> None:
    model, _ = build(recipes()["gpt2"])
    model.save_pretrained(tmp_path / "gpt2")
    vocabulary, width = model.get_input_embeddings().weight.shape
    path = "base_model.model.lm_head"
    tensors = {f"{path}.lora_A.weight": torch.ones(1, width), f"{path}.lora_B.weight": torch.ones(vocabulary, 1)}
    refused(UnsupportedError, tmp_path / "gpt2", adapter(tmp_path / "head", tensors=tensors), "share one weight")
