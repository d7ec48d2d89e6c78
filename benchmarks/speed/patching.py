"""Attribution patching and patching of heads against bare forward passes of GPT-2 small's shape, one thread.

Estimates: all heads and all neurons at once, against one bare Hugging Face forward pass; "gradients" is one forward and
one backward pass for all of them, "estimates" adds the run that gives, "method" is the whole of it without a proof
(verification of ten cells and the check included). Truth: rank correlation of estimates with exact patching on small
trained and wired models. Heads: a sweep over all 12 x 12 heads against one bare
forward pass per head. Paths: all heads to the queries of one head, against the three forward passes per pair that the
procedure takes when pairs run one by one, and against one. Traces: every layer and position restored under five draws
of noise, against one hooked forward pass per draw, layer and position, and against one per layer and position with the
draws as its batch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import RESULTS, bare_pass, gpt2_small, interleaved, keep, medians, ratio
from benchmarks.speed.sweeps import head_cells, loop, prompts, put
from cutaway import catalog
from cutaway.core.metric import Metric
from cutaway.engine.estimate import estimate
from cutaway.engine.gradients import differentiable
from cutaway.engine.patching import Exchange
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.ops.stats import rank_correlation

METRIC = Metric("logit_diff", (11, 22))
SITES = "L*.attn.z, L*.mlp.act"
PAIRS = {
    "town": ("Ada Reed lives in", "Ada Stone lives in"),
    "circuit-induction": ("f m d k b i k", "f m k d b i k"),
    "circuit-ioi": (
        "When Ada and Bea went home , Bea gave a drink to",
        "When Ada and Bea went home , Ada gave a drink to",
    ),
}
KINDS = (("resid_pre", "position"), ("attn.z", "head"), ("attn.q", "head"), ("attn.v", "head"), ("mlp.act", "neurons"))


def estimates(length: int, rounds: int) -> dict[str, Any]:
    """Seconds of a bare forward pass, and of estimates as multiples of it."""
    model = Model(gpt2_small())
    base, other = map(model.inputs, prompts(length))
    exchange = Exchange.of(model, other, base, METRIC, "clean->corrupt")
    sites = model.expand(SITES)

    def gradients() -> None:
        with differentiable(model, exchange.receiver, sites) as run:
            run.gradients(METRIC)

    def method(**more: Any) -> None:
        catalog.run("attribution_patching", model, clean=other, corrupt=base, metric=METRIC, draws=0, **more)

    candidates = {
        "bare": bare_pass(model.hf, base),
        "gradients of all heads and neurons": gradients,
        "estimates of all heads and neurons": lambda: estimate(model, exchange, sites),
        "estimates of all heads and neurons, 5 steps": lambda: estimate(model, exchange, sites, 5),
        "method, every head": lambda: method(kind="attn.z", by="head"),
        "method, every neuron": lambda: method(kind="mlp.act", by="neurons", blocks=3072),
    }
    seconds = interleaved(candidates, rounds)
    return {
        "bare_seconds": medians(seconds)["bare"],
        "rounds": rounds,
        "forwards": {name: ratio(seconds, name, "bare") for name in candidates if name != "bare"},
    }


def truth() -> dict[str, Any]:
    """Rank correlation of the estimates of all cells with exact patching, and the largest error, as recovery."""
    found: dict[str, Any] = {}
    for name, (clean, corrupt) in PAIRS.items():
        model = load(name)
        metric = Exchange.of(model, clean, corrupt, None, "clean->corrupt").metric
        given = {"clean": clean, "corrupt": corrupt, "metric": metric}
        for kind, by in KINDS:
            swept: Any = catalog.run("patch", model, kind=kind, by=by, **given)
            exact = torch.from_numpy(swept.values.copy())
            if float(exact.abs().max()) < 1e-3:
                continue
            for steps in (1, 5, 10):
                grid: Any = catalog.run(
                    "attribution_patching", model, kind=kind, by=by, steps=steps, draws=0, verify=0, **given
                )
                values = torch.from_numpy(grid.values.copy())
                found[f"{name}, {kind} by {by}, {steps} step{'s'[: steps > 1]}"] = {
                    "rank_correlation": rank_correlation(values, exact),
                    "largest_error": float((values - exact).abs().max()),
                }
    return found


def heads(length: int, rounds: int) -> dict[str, Any]:
    """The sweep over every head, against one bare pass with one hook per head."""
    model = Model(gpt2_small())
    base, other = map(model.inputs, prompts(length))
    cells = head_cells(model, base, other)

    def sweep() -> None:
        catalog.run("patch", model, clean=other, corrupt=base, metric=METRIC, kind="attn.z", by="head")

    seconds = interleaved({"loop": lambda: loop(model.hf, base, [[cell] for cell in cells]), "patch": sweep}, rounds)
    return {
        "heads": len(cells),
        "rounds": rounds,
        "median_seconds": medians(seconds),
        "times_faster": ratio(seconds, "loop", "patch"),
    }


def three_passes(hf: nn.Module, exchange: Exchange, layer: int, head: int, sender: tuple[int, int], z: Any) -> float:
    """One pair as the paper runs it: the run that gives, the run with everything else frozen, the run that is read.

    Frozen are the outputs of attention and of MLPs; ``z`` holds them and what enters the output matrices.
    """
    blocks, width = hf.transformer.h, z["z"][0].shape[-1] // 12
    caught: dict[str, torch.Tensor] = {}
    gives, base = exchange.giver.ids, exchange.receiver.ids

    def run(ids: torch.Tensor, hooks: Sequence[Any]) -> torch.Tensor:
        try:
            return hf(input_ids=ids, use_cache=False).logits[0, -1]
        finally:
            for hook in hooks:
                hook.remove()

    own = slice(sender[1] * width, (sender[1] + 1) * width)
    query = slice(head * width, (head + 1) * width)
    run(gives, [blocks[sender[0]].attn.c_proj.register_forward_pre_hook(lambda m, a: caught.update(z=a[0][..., own]))])
    hooks = [blocks[layer].attn.c_attn.register_forward_hook(lambda m, a, o: caught.update(q=o[..., query].clone()))]
    for i, block in enumerate(blocks[: layer + 1]):
        if i != sender[0]:
            hooks.append(block.attn.c_proj.register_forward_hook(lambda m, a, o, i=i: z["attention"][i]))
        hooks.append(block.mlp.c_proj.register_forward_hook(lambda m, a, o, i=i: z["mlp"][i]))
    hooks.append(
        blocks[sender[0]].attn.c_proj.register_forward_pre_hook(
            lambda m, a: (put((..., own), caught["z"])(z["z"][sender[0]]),)
        )
    )
    run(base, hooks)
    logits = run(
        base, [blocks[layer].attn.c_attn.register_forward_hook(lambda m, a, o: put((..., query), caught["q"])(o))]
    )
    return float(logits[METRIC.ids[0]] - logits[METRIC.ids[1]])


def paths(length: int, rounds: int, layer: int = 9, head: int = 6, timed: int = 12) -> dict[str, Any]:
    """All heads to the queries of one head, against the same pair by pair; some pairs are timed and scaled to all."""
    model = Model(gpt2_small())
    base, other = map(model.inputs, prompts(length))
    exchange = Exchange.of(model, other, base, METRIC, "clean->corrupt")
    blocks: Any = model.hf.transformer.h
    kept: dict[str, Any] = {"z": {}, "attention": {}, "mlp": {}}
    hooks = []
    for i, block in enumerate(blocks):
        hooks.append(block.attn.c_proj.register_forward_pre_hook(lambda m, a, i=i: kept["z"].update({i: a[0]})))
        hooks.append(block.attn.c_proj.register_forward_hook(lambda m, a, o, i=i: kept["attention"].update({i: o})))
        hooks.append(block.mlp.c_proj.register_forward_hook(lambda m, a, o, i=i: kept["mlp"].update({i: o})))
    with torch.no_grad():
        plain = model(base)[0, -1]
    for hook in hooks:
        hook.remove()
    senders = [(i, h) for i in range(layer) for h in range(12)]
    sample = senders[:: max(1, len(senders) // timed)]
    found: dict[str, Any] = {}

    def naive() -> None:
        with torch.no_grad():
            found["naive"] = [three_passes(model.hf, exchange, layer, head, s, kept) for s in sample]

    def single() -> None:
        with torch.no_grad():
            for _ in sample:
                model.hf(input_ids=base.ids, use_cache=False)

    def ours() -> None:
        found["ours"] = catalog.run(
            "path_patching",
            model,
            clean=other,
            corrupt=base,
            metric=METRIC,
            receivers=f"L{layer}.attn.q[{head}]",
            normalise=False,
            draws=0,
        )

    seconds = interleaved({"three passes per pair": naive, "one pass per pair": single, "ours": ours}, rounds)
    scale = len(senders) / len(sample)
    for name in ("three passes per pair", "one pass per pair"):
        seconds[name] = [s * scale for s in seconds[name]]
    start = float(plain[METRIC.ids[0]] - plain[METRIC.ids[1]])
    error = max(
        float(abs(n - start - found["ours"].values[i, h])) for n, (i, h) in zip(found["naive"], sample, strict=True)
    )
    return {
        "receiver": f"L{layer}.attn.q[{head}]",
        "pairs": len(senders),
        "pairs_timed": len(sample),
        "rounds": rounds,
        "median_seconds": medians(seconds),
        "times_faster": {name: ratio(seconds, name, "ours") for name in ("three passes per pair", "one pass per pair")},
        "largest_difference": error,
    }


def state_of(out: Any) -> Tensor:
    """The state that a layer gives, whether alone or first of several."""
    return out[0] if isinstance(out, tuple) else out


def with_state(out: Any, state: Tensor) -> Any:
    """What a layer gives, with another state."""
    return (state, *out[1:]) if isinstance(out, tuple) else state


def traces(length: int, rounds: int, noises: int = 5, timed: int = 6) -> dict[str, Any]:
    """States restored one by one under noise on two tokens; some cells of the loops are timed and scaled to all."""
    model = Model(gpt2_small())
    ids, subject = prompts(length)[0], [1, 2]
    hf: Any = model.hf
    blocks, embed = hf.transformer.h, hf.get_input_embeddings()
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = catalog.run(
            "causal_trace",
            model,
            prompt=ids,
            subject=" ".join(f"#{token}" for token in ids[0, subject].tolist()),
            metric=METRIC,
            samples=noises,
            normalise=False,
            draws=0,
        )

    clean: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda m, a, o: clean.append(state_of(o))) for block in blocks]
    with torch.no_grad():
        model.hf(input_ids=ids, use_cache=False)
        size = 3.0 * embed(ids[:, subject]).std()
    for hook in hooks:
        hook.remove()
    shape = (noises, len(subject), clean[0].shape[-1])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size
    cells = [(i, t) for i in range(len(blocks)) for t in range(length)]
    sample = cells[:: max(1, len(cells) // timed)]

    def restored(draws: Tensor, cell: tuple[int, int] | None) -> Tensor:
        """[draw] the metric with noise and one state restored, or none, in one hooked forward pass."""

        def drown(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            return put((slice(None), subject), out[:, subject] + draws)(out)

        hooks = [embed.register_forward_hook(drown)]
        if cell is not None:
            back = put((slice(None), cell[1]), clean[cell[0]][:, cell[1]])
            hooks.append(blocks[cell[0]].register_forward_hook(lambda m, a, o: with_state(o, back(state_of(o)))))
        try:
            logits = model.hf(input_ids=ids.expand(len(draws), -1), use_cache=False).logits[:, -1]
        finally:
            for hook in hooks:
                hook.remove()
        return logits[:, METRIC.ids[0]] - logits[:, METRIC.ids[1]]

    def single() -> None:
        with torch.no_grad():
            for cell in sample:
                for one in noise:
                    restored(one[None], cell)

    def batched() -> None:
        with torch.no_grad():
            found["batched"] = torch.stack([restored(noise, cell) for cell in sample])

    names = {"a forward per draw and cell": single, "a forward per cell, draws as its batch": batched}
    seconds = interleaved({**names, "ours": ours}, rounds, clock=time.process_time)
    whole = len(blocks) * length
    for name in names:
        seconds[name] = [s * whole / len(sample) for s in seconds[name]]
    with torch.no_grad():
        back = found["batched"].mean(1) - restored(noise, None).mean()
    error = max(abs(float(b) - found["ours"].values[0, i, t]) for b, (i, t) in zip(back, sample, strict=True))
    return {
        "cells": whole,
        "draws": noises,
        "cells_timed": len(sample),
        "rounds": rounds,
        "median_process_seconds": medians(seconds),
        "times_faster": {name: ratio(seconds, name, "ours") for name in names},
        "largest_difference": float(error),
    }


def main() -> None:
    """Measure what is asked for and keep it, next to what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="run the parts whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = {
        "estimates T=16": lambda: estimates(16, options.rounds),
        "estimates T=64": lambda: estimates(64, options.rounds),
        "truth": truth,
        "heads T=16": lambda: heads(16, options.rounds),
        "paths T=16": lambda: paths(16, options.rounds),
        "traces T=12": lambda: traces(12, options.rounds),
    }
    before = RESULTS / "patching.json"
    known = options.only is not None and before.is_file()
    figures = json.loads(before.read_text())["figures"] if known else {}
    for name, measure in parts.items():
        if options.only is None or options.only in name:
            figures[name] = measure()
            print(name, figures[name], flush=True)
            keep("patching", figures, __doc__ or "")


if __name__ == "__main__":
    main()
