"""What watching costs: unwatched, capturing, all patterns, loading, importing; against plain transformers."""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import bare_pass, interleaved, keep, medians, ratio
from cutaway.models.handle import Model

LENGTHS = (16, 64, 256)
CAPTURE = "L*.resid_pre, L*.resid_mid, L*.resid_post, L*.attn.z, L*.mlp.act"
BARS = {"unwatched": 1.02, "capture": 1.10, "patterns against eager": 1.25}


def models() -> dict[str, torch.nn.Module]:
    """GPT-2 small's shape, and a 12-layer Llama with grouped-query heads; random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=1024,
    )
    return {"gpt2-small": GPT2LMHeadModel(GPT2Config()).eval(), "llama-gqa": LlamaForCausalLM(llama).eval()}


def watching(name: str, hf: torch.nn.Module, runs: int) -> dict[str, Any]:
    """Ratios of watched runs to bare ones, per prompt length."""
    eager = copy.deepcopy(hf)
    eager.set_attn_implementation("eager")
    model = Model(hf, name=name)
    figures: dict[str, Any] = {}
    for length in LENGTHS:
        ids = torch.randint(1000, 30000, (1, length), generator=torch.Generator().manual_seed(length))
        inputs = model.inputs(ids)
        seconds = interleaved(
            {
                "bare": bare_pass(hf, inputs),
                "unwatched": partial(model.trace, inputs),
                "capture": partial(model.trace, inputs, want=CAPTURE),
                "patterns": partial(model.trace, inputs, want="L*.attn.pattern"),
                "eager": bare_pass(eager, inputs),
            },
            runs=runs,
            warmup=2,
        )
        figures[f"T={length}"] = {
            "unwatched": ratio(seconds, "unwatched", "bare"),
            "capture": ratio(seconds, "capture", "bare"),
            "patterns": ratio(seconds, "patterns", "bare"),
            "patterns against eager": ratio(seconds, "patterns", "eager"),
            "bare_seconds": medians(seconds)["bare"],
        }
    return figures


def loading(runs: int) -> dict[str, float]:
    """What ``cutaway.load`` adds to transformers' own loading of GPT-2 small's shape, in seconds and MiB."""
    script = """
import resource, sys, time, torch
torch.set_num_threads(1)
import transformers
from transformers import AutoModelForCausalLM
import cutaway, cutaway.models.load
folder, how = sys.argv[1:]
start = time.perf_counter()
if how == "cutaway":
    model = cutaway.load(folder)
else:
    model = AutoModelForCausalLM.from_pretrained(folder)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    with tempfile.TemporaryDirectory() as folder:
        models()["gpt2-small"].save_pretrained(folder)
        found: dict[str, list[tuple[float, float]]] = {"cutaway": [], "transformers": []}
        for _ in range(runs):
            for how, kept in found.items():
                out = subprocess.run(
                    [sys.executable, "-W", "ignore", "-c", script, folder, how],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                seconds, size = map(float, out.stdout.split()[-2:])
                kept.append((seconds, size / 1024))
    ours, theirs = (
        [statistics.median(values[i] for values in found[how]) for i in (0, 1)] for how in ("cutaway", "transformers")
    )
    return {"added_seconds": ours[0] - theirs[0], "added_mib": ours[1] - theirs[1], "transformers_seconds": theirs[0]}


def importing(runs: int) -> dict[str, float]:
    """Seconds that ``import cutaway`` takes after torch is imported."""
    script = "import torch, time; t = time.perf_counter(); import cutaway; print(time.perf_counter() - t)"
    found = [
        float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
        for _ in range(runs)
    ]
    return {"seconds_beyond_torch": statistics.median(found)}


def main(runs: int = 15) -> None:
    """Measure, print, keep."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    figures: dict[str, Any] = {name: watching(name, hf, runs) for name, hf in models().items()}
    figures["load"] = loading(5)
    figures["import"] = importing(5)
    figures["bars"] = BARS
    path = keep("engine", figures, "ratios are medians over rounds taken in turns, one thread")
    for name in ("gpt2-small", "llama-gqa"):
        for length, row in figures[name].items():
            print(name, length, "  ".join(f"{k} {v:.3f}" for k, v in row.items()))
    print("load", figures["load"], "import", figures["import"])
    print(f"{path.name} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
