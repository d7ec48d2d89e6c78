"""Writes what TransformerLens' bridge sees in small models, for tests/equivalence/test_transformer_lens.py.

    python -m tools.make_oracle

Only for an environment that has transformer-lens; the tests need just the files that this writes. The models are drawn
here (``build``) from recipes in tests/golden/transformer_lens/models.json, bit for bit alike on every machine.
"""

from __future__ import annotations

import importlib
import json
import math
import platform
import random
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden" / "transformer_lens"
ROWS, POSITIONS = 2, 6
SPREAD = 0.3  # of biases around 0 and of norms' scales around 1, so that leaving one out shows
KEPT = re.compile(
    r"logits|hook_embed|ln_final\.hook_(?:normalized|out)"
    r"|blocks\.\d+\.(?:hook_(?:resid_(?:pre|mid|post)|attn_out|mlp_out)"
    r"|attn\.hook_(?:q|k|v|z|rot_q|rot_k|attn_scores|pattern)|mlp\.hook_(?:in|post))"
)


def recipes() -> dict[str, dict[str, Any]]:
    """Class, configuration and seed of each model, by its short name."""
    found: dict[str, dict[str, Any]] = json.loads((FOLDER / "models.json").read_text(encoding="utf-8"))
    return found


def build(recipe: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """The model of a recipe (float32, eval mode) and its ids [row, position].

    Python's ``random.random`` draws every number: of all generators it alone promises the same stream for ever.
    """
    import transformers

    cls = getattr(transformers, recipe["class"])
    config = cls.config_class(**recipe["config"])
    config.architectures = [recipe["class"]]  # by this the bridge knows the family
    model = cls(config).eval()
    stream = random.Random(recipe["seed"])
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            drawn = [2 * stream.random() - 1 for _ in range(weight.numel())]
            values = torch.tensor(drawn, dtype=torch.float32).reshape(weight.shape)
            if weight.ndim == 1:
                weight.copy_(SPREAD * values + name.endswith("weight"))
            else:
                weight.copy_(math.sqrt(3 / min(weight.shape[-2:])) * values)
    vocabulary = recipe["config"]["vocab_size"]
    ids = [[int(stream.random() * vocabulary) for _ in range(POSITIONS)] for _ in range(ROWS)]
    return model, torch.tensor(ids)


def seen(recipe: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Name and activation of everything kept from the bridge's cache, and the logits."""
    bridge_class = importlib.import_module("transformer_lens.model_bridge").TransformerBridge
    model, ids = build(recipe)
    bridge = bridge_class.boot_transformers(
        recipe["class"], hf_model=model, device="cpu", tokenizer=_tokenizer(recipe["config"]["vocab_size"])
    )
    bridge.eval()
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids)
    for name, value in [*cache.items(), ("logits", logits)]:
        if KEPT.fullmatch(name):
            yield name, value.detach().clone().contiguous()


def _tokenizer(size: int) -> Any:
    """A tokenizer of ``size`` words: the bridge asks for one, although it is given ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"#{i}": i for i in range(size)}, unk_token="#0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="#0", pad_token="#0")


def write_versions(folder: Path, oracle: str) -> None:
    """Say in ``versions.json`` what made the files of a folder."""
    made_with = {package: version(package) for package in (oracle, "transformers", "torch")}
    text = json.dumps({**made_with, "python": platform.python_version()}, indent=2)
    (folder / "versions.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Write one file per recipe, and the versions that made them."""
    for name, recipe in recipes().items():
        arrays = dict(seen(recipe))
        save_file(arrays, FOLDER / f"{name}.safetensors")
        print(f"{name}: {len(arrays)} arrays")
    write_versions(FOLDER, "transformer-lens")


if __name__ == "__main__":
    main()
