"""Sweeps by replay against one forward pass per cell, and against two other libraries where they are installed.

The loop is the barest there is: one Hugging Face forward per cell with one hook. Where it would take minutes a round,
evenly spaced cells of it are timed and scaled to all; every pass costs the same. The other libraries sweep the same
cells of a copy of the same model.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import gpt2_small, interleaved, keep, medians
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Intervention, Set
from cutaway.core.metric import Metric
from cutaway.engine import products, replay
from cutaway.models.handle import Model

LAYERS, WIDTH, HEADS, VOCABULARY = 12, 768, 12, 50257
METRIC = Metric("logit_diff", (11, 22))
SAMPLE = 12
"""Passes of the loop that are timed where all would take long."""
WHOLE = 4096
"""Tokens, over all passes of a loop, up to which it is timed whole."""
BLOCK = 256
"""Neurons of a block."""


def llama_config() -> Any:
    """A 12-layer Llama with grouped-query heads."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=4,
        vocab_size=32000,
    )


def llama() -> nn.Module:
    """A module of ``llama_config``, random weights."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config()).eval()


def llava(patches: int, question: int) -> tuple[nn.Module, Inputs]:
    """LLaVA around ``llama_config`` with a small vision tower; an image of so many patches before the question."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    side = round(patches**0.5) * 14
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=side,
        patch_size=14,
    )
    image_token = 31999
    config = LlavaConfig(vision_config=vision, text_config=llama_config(), image_token_id=image_token)
    hf = LlavaForConditionalGeneration(config).eval()
    ids = torch.cat([torch.full((patches,), image_token), torch.randint(5, 30000, (question,))])[None]
    roles = ("image",) * patches + ("text",) * question
    pixels = {"pixel_values": torch.randn(1, 3, side, side)}
    return hf, Inputs(ids, torch.ones_like(ids), (tuple(f"#{i}" for i in ids[0].tolist()),), (roles,), pixels)


def prompts(length: int, differ_from: int = 0) -> tuple[Tensor, Tensor]:
    """Two prompts of random tokens, equal before ``differ_from``."""
    draw = torch.Generator().manual_seed(length)
    base = torch.randint(1000, 30000, (1, length), generator=draw)
    other = torch.randint(1000, 30000, (1, length), generator=draw)
    other[:, :differ_from] = base[:, :differ_from]
    return base, other


@contextmanager
def patched(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, the module's first argument is changed."""
    handle = module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


Cell = tuple[nn.Module, Callable[[Tensor], Tensor], Intervention]
"""What a run does to which module's input in the bare loop, and the same as an intervention."""


def loop(hf: nn.Module, inputs: Inputs, runs: Sequence[list[Cell]]) -> list[float]:
    """One forward pass per run; the metric of each."""
    found = []
    with torch.no_grad():
        for cells in runs:
            with ExitStack() as patches:
                for module, change, _ in cells:
                    patches.enter_context(patched(module, change))
                logits = hf(**inputs.kwargs(torch.device("cpu")), use_cache=False).logits[0, -1]
            found.append(float(logits[METRIC.ids[0]] - logits[METRIC.ids[1]]))
    return found


def put(index: Any, value: Tensor) -> Callable[[Tensor], Tensor]:
    """Writes ``value`` at ``index`` of a copy."""

    def change(x: Tensor) -> Tensor:
        new = x.clone()
        new[index] = value
        return new

    return change


def residual_cells(model: Model, inputs: Inputs, other: Inputs, positions: Sequence[int]) -> list[Cell]:
    """Every layer at every position: the residual stream of the other prompt."""
    source = model.trace(other, want="L*.resid_pre").stack("L*.resid_pre")
    blocks = [model.hf.get_submodule(layer.path) for layer in model.layers]
    return [
        (blocks[i], put((0, p), source[i, 0, p]), Set(f"L{i}.resid_pre@{p}", source[i, :, p : p + 1]))
        for i in range(len(blocks))
        for p in positions
    ]


def head_cells(model: Model, inputs: Inputs, other: Inputs) -> list[Cell]:
    """Every head at all positions."""
    source = model.trace(other, want="L*.attn.z").stack("L*.attn.z")
    width = source.shape[-1]
    return [
        (
            model.hf.get_submodule(layer.w_o),
            put((..., slice(h * width, (h + 1) * width)), source[i, :, :, h]),
            Set(f"L{i}.attn.z[{h}]", source[i, :, :, h : h + 1]),
        )
        for i, layer in enumerate(model.layers)
        for h in range(source.shape[3])
    ]


def neuron_cells(model: Model, inputs: Inputs, other: Inputs) -> list[Cell]:
    """Every block of neurons at all positions."""
    source = model.trace(other, want="L*.mlp.act").stack("L*.mlp.act")
    return [
        (
            model.hf.get_submodule(layer.w_out),
            put((..., slice(n, n + BLOCK)), source[i, :, :, n : n + BLOCK]),
            Set(f"L{i}.mlp.act[{n}-{n + BLOCK - 1}]", source[i, :, :, n : n + BLOCK]),
        )
        for i, layer in enumerate(model.layers)
        for n in range(0, source.shape[-1], BLOCK)
    ]


def pair_runs(model: Model, inputs: Inputs, other: Inputs) -> list[list[Cell]]:
    """Every head at all positions, and the residual stream of a later layer at one position with it."""
    heads, residuals = (
        head_cells(model, inputs, other),
        residual_cells(model, inputs, other, range(inputs.ids.shape[1])),
    )
    later = [residuals[(i // HEADS * 16 + i % 16 + 48) % len(residuals)] for i in range(len(heads))]
    return [[a, b] for a, b in zip(heads, later, strict=True)]


def operations(hf: nn.Module, inputs: Inputs, cells: Sequence[Cell]) -> dict[str, float]:
    """Floating-point operations of the matrix products of both; attention kernels are not counted."""
    model = Model(hf)
    runs = [run for _, _, run in cells]
    replay(model, inputs, runs[:1], METRIC, plain=False)  # the check at first use
    with FlopCounterMode(display=False) as one:
        loop(hf, inputs, [[cells[0]]])
    with mock.patch.object(products, "chosen_product", return_value=None), FlopCounterMode(display=False) as all_:
        replay(model, inputs, runs, METRIC, plain=False)
    both = {"loop": float(one.get_total_flops() * len(cells)), "replay": float(all_.get_total_flops())}
    return {**both, "times_replay": both["loop"] / both["replay"]}


def compare(
    hf: nn.Module,
    inputs: Inputs,
    cells: Sequence[list[Cell]],
    rounds: int,
    others: dict[str, Callable[[], list[float]]],
) -> dict[str, Any]:
    """Medians of the loop, of replay and of others, the ratios to replay, and the largest difference of the values."""
    model = Model(hf)
    runs = [[run for _, _, run in several] if len(several) > 1 else several[0][2] for several in cells]
    few = len(cells) * inputs.ids.shape[1] <= WHOLE
    sample = list(range(0, len(cells), 1 if few else max(1, len(cells) // SAMPLE)))
    found: dict[str, Any] = {}

    def by_loop() -> None:
        found["loop"] = loop(hf, inputs, [cells[i] for i in sample])

    def by_replay() -> None:
        found["replay"] = replay(model, inputs, runs, METRIC, plain=False)

    def keeping(name: str, sweep: Callable[[], list[float]]) -> Callable[[], None]:
        def run() -> None:
            found[name] = sweep()
            gc.collect()  # the rounds run without the collector, and a sweep may leave gigabytes to it

        return run

    by_replay()  # the check at first use
    seconds = interleaved(
        {"loop": by_loop, "replay": by_replay, **{name: keeping(name, f) for name, f in others.items()}}, rounds
    )
    scale = len(cells) / len(sample)
    seconds["loop"] = [s * scale for s in seconds["loop"]]
    values = found["replay"].values
    size = float(values.abs().max())
    return {
        "cells": len(cells),
        "loop_passes_timed": len(sample),
        "rounds": rounds,
        "median_seconds": medians(seconds),
        "times_replay": {
            name: statistics.median(a / b for a, b in zip(seconds[name], seconds["replay"], strict=True))
            for name in seconds
            if name != "replay"
        },
        "largest_difference": {
            name: float((values[sample] if name == "loop" else values).sub(torch.tensor(found[name])).abs().max())
            / size
            for name in seconds
            if name != "replay"
        },
        "peak_estimate_mib": found["replay"].peak_estimate / 2**20,
    }


def tokenizer() -> Any:
    """A tokenizer that the other libraries can be given; its words do not matter."""
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    plain = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t1", bos_token="t2", eos_token="t3", unk_token="t0"
    )
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


def by_transformer_lens(hf: nn.Module, inputs: Inputs, other: Inputs) -> Callable[[], list[float]] | str:
    """Its own residual sweep over every layer and position; a reason when it is not installed."""
    try:
        from transformer_lens import TransformerBridge, patching
    except ImportError:
        return "transformer-lens is not installed"
    words = tokenizer()
    with tempfile.TemporaryDirectory() as folder:  # it loads the tokenizer again from where it lies
        words.save_pretrained(folder)
        words.init_kwargs["name_or_path"] = words.name_or_path = folder
        bridge = TransformerBridge.boot_transformers("gpt2", hf_model=copy.deepcopy(hf), tokenizer=words)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(other.ids)

    def sweep() -> list[float]:
        with torch.no_grad():
            grid = patching.get_act_patch_resid_pre(
                bridge, inputs.ids, cache, lambda x: x[0, -1, METRIC.ids[0]] - x[0, -1, METRIC.ids[1]]
            )
        return grid.flatten().tolist()

    return sweep


def by_nnsight(hf: nn.Module, inputs: Inputs, other: Inputs) -> Callable[[], list[float]] | str:
    """One trace per layer, one invoke per position, batched by the library; a reason when it is not installed."""
    try:
        from nnsight.modeling.transformers import TransformersModel
    except ImportError:
        return "nnsight is not installed"
    wrapped = TransformersModel(copy.deepcopy(hf), task="text-generation", tokenizer=tokenizer())
    source = Model(hf).trace(other, want="L*.resid_pre").stack("L*.resid_pre")
    first, second = METRIC.ids

    def sweep() -> list[float]:
        found: list[float] = []
        for layer in range(LAYERS):
            with torch.no_grad(), wrapped.trace() as tracer:
                values: Any = list().save()  # type: ignore[attr-defined]  # noqa: C408  (the library gives lists a save method)
                for p in range(inputs.ids.shape[1]):
                    with tracer.invoke(inputs.ids):
                        wrapped.transformer.h[layer].input[:, p] = source[layer, :, p]
                        logits = wrapped.lm_head.output[0, -1]
                        values.append(logits[first] - logits[second])
            found.extend(float(v) for v in values)
        return found

    return sweep


def rows_run(hf: nn.Module, layers: Sequence[nn.Module], run: Callable[[], Any]) -> int:
    """How many rows (positions of runs) went through the layers."""
    count = 0

    def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        x = args[0] if args else kwargs["hidden_states"]
        count += x.shape[0] * x.shape[1]

    handles = [layer.register_forward_pre_hook(seen, with_kwargs=True) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return count


def main() -> None:
    """Run the sweeps and keep the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="part of a sweep's name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}

    def sweep(name: str, make: Callable[[], tuple[nn.Module, Inputs, list[Any], dict[str, Any]]]) -> None:
        if options.only not in name:
            return
        hf, inputs, cells, others = make()
        present = {k: f for k, f in others.items() if not isinstance(f, str)}
        runs = [several if isinstance(several, list) else [several] for several in cells]
        figures[name] = compare(hf, inputs, runs, options.rounds, present)
        figures[name]["product"] = getattr(products.chosen_product(1), "__name__", "torch's own")
        figures[name]["absent"] = {k: f for k, f in others.items() if isinstance(f, str)}
        print(name, figures[name]["times_replay"], figures[name]["largest_difference"], flush=True)
        keep("sweeps" if not options.only else "sweeps-some", figures, __doc__ or "")

    def residual(hf: nn.Module, length: int, differ_from: int = 0, peers: bool = False, counted: bool = False) -> Any:
        model = Model(hf)
        base, other = map(model.inputs, prompts(length, differ_from))
        cells = residual_cells(model, base, other, range(length))
        if counted:
            figures[f"gpt2 operations T={length}"] = operations(hf, base, cells)
        others = {}
        if peers:
            others = {
                "transformer_lens": by_transformer_lens(hf, base, other),
                "nnsight": by_nnsight(hf, base, other),
            }
        return hf, base, cells, others

    def inside(hf: nn.Module, length: int, cells_of: Callable[[Model, Inputs, Inputs], list[Any]]) -> Any:
        model = Model(hf)
        base, other = map(model.inputs, prompts(length))
        return hf, base, cells_of(model, base, other), {}

    def pictured(patches: int, question: int) -> Any:
        hf, base = llava(patches, question)
        model = Model(hf)
        changed = base.ids.clone()
        changed[:, patches:] = torch.randint(5, 30000, (1, question))
        other = Inputs(changed, base.mask, base.tokens, base.roles, base.extra)
        cells = residual_cells(model, base, other, range(patches, patches + question))
        layers = [hf.get_submodule(layer.path) for layer in model.layers]
        runs = [run for _, _, run in cells]
        replay(model, base, runs, METRIC, plain=False)
        replayed = rows_run(hf, layers, lambda: replay(model, base, runs, METRIC, plain=False))
        figures[f"llava, rows through layers, {patches} patches"] = {
            "loop": len(cells) * len(layers) * (patches + question),
            "replay": replayed,
            "base_run_of_it": len(layers) * (patches + question),
        }
        return hf, base, cells, {}

    sweep("gpt2 residual T=16", lambda: residual(gpt2_small(), 16, peers=True, counted=True))
    sweep("gpt2 residual T=64", lambda: residual(gpt2_small(), 64, counted=True))
    sweep("gpt2 residual T=64, prompts equal before 32", lambda: residual(gpt2_small(), 64, 32))
    sweep("gpt2 heads T=16", lambda: inside(gpt2_small(), 16, head_cells))
    sweep("gpt2 neuron blocks T=16", lambda: inside(gpt2_small(), 16, neuron_cells))
    sweep("gpt2 pairs of a head and a position T=16", lambda: inside(gpt2_small(), 16, pair_runs))
    sweep("llama-gqa residual T=16", lambda: residual(llama(), 16))
    sweep("llama-gqa residual T=64", lambda: residual(llama(), 64))
    sweep("llava residual, 64 patches then 12 tokens", lambda: pictured(64, 12))


if __name__ == "__main__":
    main()
