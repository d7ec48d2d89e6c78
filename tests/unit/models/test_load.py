"""load: what it returns, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from cutaway import specimens
from cutaway.core.errors import CutawayError, LoadError, UnsupportedError, WeightsError
from cutaway.models.load import load
from cutaway.models.tiny import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WORDS = {"<unk>": 0, "Ada": 1, "lives": 2, "in": 3}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny("LlamaForCausalLM").hf.save_pretrained(folder)
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "llama"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Offline mode with an empty cache, as the environment variables of the hub's client make it."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(error: type[CutawayError], ref: str | Path, *said: str, **options: Any) -> None:
    """``load`` raises ``error`` with one sentence that says all of ``said``."""
    with pytest.raises(error) as caught:
        load(ref, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for words in said:
        assert words in sentence, sentence


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reconfigure(folder: Path, **changes: Any) -> Path:
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


# -- what it returns ---------------------------------------------------------------------------------------------------
def test_a_saved_folder_opens_as_transformers_opens_it(original: Path) -> None:
    made, plain = load(original), AutoModelForCausalLM.from_pretrained(original).eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(made(ids), plain(ids, use_cache=False).logits)
    assert made.hf.state_dict().keys() == plain.state_dict().keys()
    assert not made.hf.training
    assert made.name == str(original)
    assert made.inputs("Ada lives in").ids.tolist() == [[1, 2, 3]]
    assert load(str(original)).digest == made.digest


def test_every_specimen_is_a_name() -> None:
    name = specimens.names()[0]
    assert load(name).name == name


def test_the_types_of_weights_are_said_in_short_and_in_long(original: Path) -> None:
    assert {load(original, dtype=d).dtype for d in ("bf16", "bfloat16", torch.bfloat16)} == {torch.bfloat16}
    assert {load(original, dtype=d).dtype for d in (None, "auto", "fp32")} == {torch.float32}
    assert load(load_saved_in(original, torch.float16)).dtype == torch.float16


def load_saved_in(original: Path, dtype: torch.dtype) -> Path:
    half = original.parent / "half"
    AutoModelForCausalLM.from_pretrained(original, dtype=dtype).save_pretrained(half)
    return half


@pytest.mark.parametrize("name", ["MllamaForCausalLM", "Emu3ForCausalLM", "MixtralForCausalLM", "BambaForCausalLM"])
def test_a_class_that_no_auto_class_knows_is_opened_as_it_was_saved(name: str, tmp_path: Path) -> None:
    """The language models of Mllama and Emu 3, saved alone; and two whose weights are renamed when they are saved."""
    made = tiny(name)
    made.hf.save_pretrained(tmp_path)
    opened = load(tmp_path)
    assert type(opened.hf) is type(made.hf)
    with torch.no_grad():
        assert torch.equal(opened.hf(**made.inputs).logits, made.hf(**made.inputs).logits)


def test_a_device_may_be_named(original: Path) -> None:
    assert load(original, device="cpu").device == torch.device("cpu")


def test_the_attention_may_be_chosen(original: Path) -> None:
    assert load(original, attn_implementation="eager").hf.config._attn_implementation == "eager"


def test_weights_in_several_files_are_read(original: Path, tmp_path: Path) -> None:
    one = load(original)
    one.hf.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert load(tmp_path).digest == one.digest
    next(tmp_path.glob("model-00002*")).unlink()
    refused(WeightsError, tmp_path, "names model-00002-of", "not there")


def test_a_folder_without_tokenizer_files_takes_ids(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    made = load(folder)
    assert made.processor is None
    assert made([1, 2, 3]).shape == (1, 3, 128)


def test_nothing_is_printed_and_the_settings_of_transformers_come_back(
    original: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    load(original)
    refused(WeightsError, rewrite(folder, lambda w: w.pop("model.norm.weight")))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


# -- what is asked -----------------------------------------------------------------------------------------------------
def test_what_is_asked_is_checked_before_anything_is_read(original: Path) -> None:
    refused(LoadError, original, "flot32", "did you mean 'float32'", dtype="flot32")
    refused(LoadError, original, "int8", "no floating-point type", dtype="int8")
    refused(LoadError, original, "'cuda:7'", "this machine has cpu", device="cuda:7")
    refused(LoadError, original, "'nowhere'", device="nowhere")
    refused(LoadError, original, "'no-such'", "eager", attn_implementation="no-such")


def test_layers_are_spread_only_by_accelerate(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cutaway.models.load.util.find_spec", lambda name: None)
    refused(LoadError, original, "accelerate is not installed", device="auto")


def test_only_the_hub_has_revisions(original: Path) -> None:
    refused(LoadError, original, "'v2'", "a local folder has no revisions", revision="v2")
    refused(LoadError, specimens.names()[0], "none is kept", revision="v2")
    refused(LoadError, "org/name@v1", "says another revision", revision="v2")


# -- where it is -------------------------------------------------------------------------------------------------------
def test_a_folder_that_is_not_there(original: Path) -> None:
    refused(LoadError, original.parent / "lama", "no such folder", "did you mean 'llama'")
    refused(LoadError, "./no/such/place", "no such folder", specimens.names()[0])
    refused(LoadError, original / "config.json", "it is a file", f"'{original}'")
    refused(LoadError, "what is this", "neither a specimen, a folder, nor a hub id")


def test_a_folder_without_a_model(tmp_path: Path, original: Path) -> None:
    refused(LoadError, tmp_path, "no config.json", "save_pretrained")
    refused(LoadError, original.parent, "no config.json", "'llama'")


def test_a_configuration_that_cannot_be_used(folder: Path) -> None:
    refused(UnsupportedError, reconfigure(folder, model_type="lama"), "no architecture 'lama'", "did you mean 'llama'")
    reconfigure(folder, model_type="zzzzzz", transformers_version="9.1")
    refused(UnsupportedError, folder, "'zzzzzz'", "newer transformers", "9.1")
    reconfigure(folder, auto_map={"AutoModel": "modeling.Model"})
    refused(UnsupportedError, folder, "code of its own", "never run")
    refused(UnsupportedError, reconfigure(folder, model_type="t5"), "a t5 is neither")
    refused(UnsupportedError, reconfigure(folder, model_type=None), "names no model_type")
    reconfigure(folder, model_type="llama", hidden_size="wide")
    refused(LoadError, folder, "hidden_size", "expected int")
    (folder / "config.json").write_text("{")
    refused(LoadError, folder, "config.json cannot be read")
    (folder / "config.json").write_text("[]")
    refused(LoadError, folder, "holds a list")


def test_tokenizer_files_that_cannot_be_used(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    refused(LoadError, folder, "tokenizer of", "JSONDecodeError", "takes token ids")


# -- weights -----------------------------------------------------------------------------------------------------------
def test_no_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.rename(folder / "model.gguf")
    refused(WeightsError, folder, "no model.safetensors", "only model.gguf")
    (folder / "model.gguf").unlink()
    refused(WeightsError, folder, "no model.safetensors and no other weight file")


@pytest.mark.parametrize("size", [0, 4, 5000, -1])
def test_damaged_weights(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(WeightsError, folder, "model.safetensors", "damaged or cut short")


def test_a_damaged_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    refused(WeightsError, folder, "model.safetensors.index.json is damaged")


def test_missing_weights_are_never_drawn_at_random(folder: Path) -> None:
    rewrite(folder, lambda w: [w.pop("model.norm.weight"), w.update(other=torch.zeros(3))])
    refused(WeightsError, folder, "1 that LlamaForCausalLM needs are missing: model.norm.weight", "unexpected: other")


def test_missing_weights_of_another_class_name_it(folder: Path) -> None:
    reconfigure(folder, architectures=["LlamaForSequenceClassification"])
    rewrite(folder, lambda w: w.pop("lm_head.weight"))
    refused(WeightsError, folder, "lm_head.weight", "saved as LlamaForSequenceClassification")


def test_weights_of_another_shape(folder: Path) -> None:
    rewrite(folder, lambda w: w.update({"model.norm.weight": torch.ones(3)}))
    refused(WeightsError, folder, "model.norm.weight is [3] in the file and [64]")


def test_weights_that_nothing_uses_are_named(folder: Path) -> None:
    rewrite(folder, lambda w: w.update(other=torch.zeros(3)))
    with pytest.warns(UserWarning, match="1 are not used by LlamaForCausalLM: other"):
        load(folder)


def test_weights_that_are_not_finite_are_found_at_first_use(folder: Path) -> None:
    rewrite(folder, lambda w: w["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight holds NaN"):
        load(folder).trace([1, 2, 3], want="L0.resid_post")


class Bomb:
    """Runs when a pickle file that holds it is opened without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_pickle_is_opened_only_when_trusted_and_then_only_weights(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    plain = load(folder).digest
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    refused(WeightsError, folder, "only pickle files (pytorch_model.bin)", "trust_pickle=True")
    assert load(folder, trust_pickle=True).digest == plain
    torch.save({"model.norm.weight": Bomb(tmp_path / "exploded")}, folder / "pytorch_model.bin")
    refused(WeightsError, folder, "holds more than weights", trust_pickle=True)
    assert not (tmp_path / "exploded").exists()


# -- the hub -----------------------------------------------------------------------------------------------------------
def cached(cache: Path, original: Path, revision: str = "main") -> Path:
    home = cache / "models--org--name"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / revision).write_text(COMMIT)
    return Path(shutil.copytree(original, home / "snapshots" / COMMIT))


def test_a_cached_model_is_read_offline(original: Path, offline: Path) -> None:
    cached(offline, original)
    made = load("org/name")
    assert made.name == "org/name"
    assert made.digest == load(original).digest
    assert load(f"org/name@{COMMIT}").name == f"org/name@{COMMIT}"
    assert load("org/name", revision="main").name == "org/name@main"


def test_what_is_not_cached_is_not_there_offline(original: Path, offline: Path) -> None:
    refused(LoadError, "org/other", "model 'org/other'", "offline mode is on (HF_HUB_OFFLINE)", "cache has none")
    refused(LoadError, "gpt2", "no specimen, no folder here")
    cached(offline, original)
    refused(LoadError, "org/name@v9", "at revision 'v9'", "cache has none")
    name = specimens.names()[0]
    refused(LoadError, f"{name}s", f"did you mean '{name}'")


def test_a_cached_model_of_pickle_weights_is_refused_as_a_folder_is(original: Path, offline: Path) -> None:
    snapshot = cached(offline, original)
    torch.save(load_file(snapshot / "model.safetensors"), snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").unlink()
    refused(WeightsError, "org/name", "weights of 'org/name'", "only pickle files")
    assert load("org/name", trust_pickle=True).dtype == torch.float32


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, tuple[int, str]]]:
    """A hub on this machine that answers every question about ``org/<key>`` with a status and an error code."""
    said: dict[str, tuple[int, str]] = {}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, code = next((v for k, v in said.items() if f"/{k}" in self.path), (404, "RepoNotFound"))
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield said
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_the_hub_refuses_is_said(answers: dict[str, tuple[int, str]]) -> None:
    answers |= {"gated": (401, "GatedRepo"), "aged": (404, "RevisionNotFound"), "private": (401, "RepoNotFound")}
    refused(LoadError, "org/gated", "asks for access", "hf auth login")
    refused(LoadError, "org/aged@v9", "at revision 'v9'", "not this revision")
    refused(LoadError, "org/private", "the hub shows none", "hf auth login")
    refused(LoadError, "org/none", "no folder here, and the hub shows none", "check the spelling")


def test_no_network(answers: dict[str, tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    refused(LoadError, "org/name", "the hub cannot be reached", "cache has none")


# -- surroundings ------------------------------------------------------------------------------------------------------
def test_a_torchvision_of_another_torch_is_named(original: Path, tmp_path: Path) -> None:
    package, about = tmp_path / "torchvision", tmp_path / "torchvision-0.9.1.dist-info"
    package.mkdir()
    about.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.9.1\nRequires-Dist: torch==1.8.1\n"
    )
    code = f"import cutaway; cutaway.load({str(original)!r})"
    path = os.pathsep.join([str(tmp_path), str(Path(specimens.__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "torchvision 0.9.1 is made for torch 1.8.1, and torch" in done.stderr.splitlines()[-1]
