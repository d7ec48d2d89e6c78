"""Writes low-rank adapters as peft saves them, and the logits that it gives, for tests/equivalence/test_adapters.py.

    python -m tools.make_adapter_oracle

Only for an environment that has peft; the tests need just the files that this writes. The models under the adapters
are those of tools/make_oracle.py, drawn bit for bit alike on every machine.
"""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tools.make_oracle import build, recipes, write_versions

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden" / "peft"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": (
        "gpt2",
        {
            "target_modules": ["c_attn", "c_proj", "c_fc"],
            "r": 2,
            "lora_alpha": 3,
            "rank_pattern": {"h.0.attn.c_proj": 3},
            "alpha_pattern": {"c_fc": 5},
            "fan_in_fan_out": True,
            "bias": "lora_only",
        },
    ),
    "dora": (
        "llama",
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 3, "use_dora": True, "use_rslora": True},
    ),
    "whole": (
        "llama",
        {"target_modules": ["embed_tokens", "k_proj"], "r": 2, "modules_to_save": ["post_attention_layernorm"]},
    ),
}
"""Of each case the model and the settings of its adapter."""


def main() -> None:
    """Write one folder per case: the adapter, and the logits with it."""
    peft = importlib.import_module("peft")
    models = recipes()
    for name, (base, settings) in CASES.items():
        model, ids = build(models[base])
        tuned = peft.get_peft_model(model, peft.LoraConfig(base_model_name_or_path="the/base", **settings)).eval()
        stream = random.Random(name)
        with torch.no_grad():
            for _, weight in sorted((n, p) for n, p in tuned.named_parameters() if p.requires_grad):
                drawn = [2 * stream.random() - 1 for _ in range(weight.numel())]
                weight.add_(0.3 * torch.tensor(drawn).reshape(weight.shape))
            logits = tuned(ids).logits
        tuned.peft_config["default"].base_model_name_or_path = "the/base"
        tuned.save_pretrained(FOLDER / name)
        (FOLDER / name / "README.md").unlink(missing_ok=True)
        save_file({"logits": logits.contiguous()}, FOLDER / name / "logits.safetensors")
        print(f"{name}: {sum(p.numel() for p in tuned.parameters() if p.requires_grad):,} numbers trained")
    write_versions(FOLDER, "peft")


if __name__ == "__main__":
    main()
