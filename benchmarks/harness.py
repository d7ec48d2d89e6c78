"""Time alternatives against each other in one process, and keep the figures with what they depend on."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def gpt2_small(**sizes: int) -> Any:
    """The plain module of GPT-2 small's shape, or with other ``sizes``, with random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def bare_pass(hf: Any, inputs: Any) -> Callable[[], Any]:
    """A forward pass of the plain module on ``inputs``, without gradients or a cache: what ratios are taken to."""
    import torch

    given = inputs.kwargs(hf.device)

    def bare() -> Any:
        with torch.no_grad():
            return hf(**given, use_cache=False)

    return bare


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    runs: int = 7,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run of each candidate, taken in turns so that the machine's drift meets all alike.

    ``clock=time.process_time`` counts the process's own seconds, where other work runs beside one thread.
    """
    for function in candidates.values():
        for _ in range(warmup):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    gc.disable()
    try:
        for _ in range(runs):
            for name, function in candidates.items():
                start = clock()
                function()
                seconds[name].append(clock() - start)
    finally:
        gc.enable()
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Median seconds per candidate."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of ``name`` against ``base`` of the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def interval(values: Any, samples: int = 2000) -> list[float]:
    """Mean of a tensor of numbers, and the 95 % interval of the mean by bootstrap."""
    from cutaway.ops.stats import bootstrap_means

    low, high = bootstrap_means(values[:, None], samples, seed=0)
    return [float(values.mean()), float(low), float(high)]


def peak_mib(function: Callable[[], Any]) -> float:
    """MiB by which the process's memory rose at most while ``function`` ran, in a copy of the process of its own.

    Memory that was freed before is given back first, else it would be used again, uncounted.

    Raises:
        RuntimeError: the function failed there.
    """
    import ctypes
    import os
    import resource

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            function()
            rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            os.write(write, str(rise / 1024).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as given:
        found = given.read()
    if os.waitpid(child, 0)[1] or not found:
        raise RuntimeError("what was to be measured failed in its own process")
    return float(found)


def machine() -> dict[str, Any]:
    """Processor, cores and system."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    import os

    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.system(),
    }


def commit() -> str:
    """The commit that was measured; '-dirty' when files differ from it, other than results."""

    def git(*words: str) -> str:
        root = Path(__file__).parents[1]
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=root).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def keep(name: str, figures: Mapping[str, Any], note: str = "") -> Path:
    """Write ``benchmarks/results/<name>.json``: figures, commit, machine, versions."""
    from cutaway.core.versions import versions

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    whole = {
        "name": name,
        "note": note,
        "figures": figures,
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    path.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")
    return path
