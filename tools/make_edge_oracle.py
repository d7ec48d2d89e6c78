"""Writes what the published EAP-IG code scores on small models, for tests/equivalence/test_edges_of_the_peer.py.

    python -m tools.make_edge_oracle

Only for an environment that has that code (package ``eap``) and transformer-lens below 4; the tests need just the files
that this writes. Weights are drawn as in tools/make_oracle.py, from recipes in tests/golden/eap_ig/models.json.
"""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from tools.make_oracle import build, write_versions

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden" / "eap_ig"
PAIRS, POSITIONS, CHANGED, STEPS = 4, 8, (3, 6), (1, 5)


def recipes() -> dict[str, dict[str, Any]]:
    """Class, configuration and seed of each model, and what transformer-lens calls the configuration."""
    found: dict[str, dict[str, Any]] = json.loads((FOLDER / "models.json").read_text(encoding="utf-8"))
    return found


def task(recipe: dict[str, Any]) -> tuple[list[list[int]], list[list[int]], list[int], list[int]]:
    """Clean and corrupt ids [pair][pos], which begin with 0, and each pair's answer and rival."""
    stream, n = random.Random(recipe["seed"] + 1), recipe["config"]["vocab_size"] - 1

    def drawn() -> int:
        return 1 + int(stream.random() * n)

    clean = [[0, *(drawn() for _ in range(POSITIONS - 1))] for _ in range(PAIRS)]
    corrupt = [[drawn() if p in CHANGED else token for p, token in enumerate(row)] for row in clean]
    return clean, corrupt, [drawn() for _ in range(PAIRS)], [drawn() for _ in range(PAIRS)]


def scores(recipe: dict[str, Any]) -> dict[str, Tensor]:
    """{name: [sender, receiver]} as the published code gives them, mean over pairs of the logit difference."""
    attribute, graphs = importlib.import_module("eap.attribute"), importlib.import_module("eap.graph")
    model = _hooked(recipe)
    clean, corrupt, answers, rivals = task(recipe)
    label = torch.tensor([answers, rivals]).T
    data = [([_said(row) for row in clean], [_said(row) for row in corrupt], label)]

    def metric(logits: Tensor, _: Tensor, lengths: Tensor, label: Tensor) -> Tensor:
        named = logits[torch.arange(len(logits)), lengths - 1].gather(1, label)
        return (named[:, 0] - named[:, 1]).sum()  # the code divides by the number of pairs

    graph, zeros, found = graphs.Graph.from_model(model), torch.zeros, {}

    def on_cpu(*size: Any, **how: Any) -> Tensor:
        return zeros(*size, **{**how, "device": "cpu"})  # the code asks for "cuda"

    with mock.patch("torch.zeros", on_cpu):
        found["eap"] = attribute.get_scores_eap(model, graph, data, metric, quiet=True)
        for steps in STEPS:
            found[f"eap_ig_{steps}"] = attribute.get_scores_eap_ig(model, graph, data, metric, steps=steps, quiet=True)
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def _said(row: list[int]) -> str:
    return " ".join(f"#{i}" for i in row[1:])  # the code puts the begin token before


def _hooked(recipe: dict[str, Any]) -> Any:
    """The model in transformer-lens, unfolded; its logits are compared with the original's."""
    lens = importlib.import_module("transformer_lens")
    conversions = importlib.import_module("transformer_lens.pretrained.weight_conversions")
    hf, _ = build(recipe)
    switches = {"use_attn_result": True, "use_split_qkv_input": True, "use_hook_mlp_in": True, "device": "cpu"}
    config = lens.HookedTransformerConfig(**recipe["lens"], **switches)
    model = lens.HookedTransformer(config)
    model.load_state_dict(getattr(conversions, recipe["conversion"])(hf, config), strict=False)
    model.tokenizer = _tokenizer(recipe["config"]["vocab_size"])
    model.cfg.tokenizer_prepends_bos = False  # set_tokenizer would ask for one from the hub
    ids = torch.tensor(task(recipe)[0])
    with torch.no_grad():
        theirs, ours = model(ids).log_softmax(-1), hf(ids).logits.log_softmax(-1)
    if not torch.allclose(theirs, ours, atol=1e-4):
        raise SystemExit(f"transformer-lens computes another model, by {float((theirs - ours).abs().max()):.2g}")
    return model


def _tokenizer(size: int) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"#{i}": i for i in range(size)}, unk_token="#0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="#0", eos_token="#0", pad_token="#0")


def main() -> None:
    """Write one file per recipe, and the versions that made them."""
    for name, recipe in recipes().items():
        arrays = scores(recipe)
        save_file(arrays, FOLDER / f"{name}.safetensors")
        print(f"{name}: {len(arrays)} arrays")
    write_versions(FOLDER, "transformer-lens")


if __name__ == "__main__":
    main()
