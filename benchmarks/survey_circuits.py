"""Edges and circuits on every architecture of the installed transformers: figures for docs/methods/edges.md.

Each class is built tiny with random weights. `edges` and `faithfulness` run on a pair of prompts, and their own checks
are read: the embedding's edges add up to its own gradient, all edges are the run, none is the corrupt one.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import keep
from cutaway import catalog
from cutaway.core.errors import CutawayError
from cutaway.core.inputs import Inputs
from cutaway.core.progress import track
from cutaway.models.doctor import sentence
from cutaway.models.handle import Model
from cutaway.models.tiny import architectures, tiny

STATUSES = ("runs", "refused", "fails")
PROMPTS = ("decoder_input_ids", "input_ids")


def pair(model: Model, given: dict[str, torch.Tensor]) -> tuple[Inputs, Inputs]:
    """A prompt, and the same with every second of its words another; a decoder's, where there is an encoder beside."""
    name = next(each for each in PROMPTS if each in given)
    ids = given[name]
    other, seen = ids.clone(), set(ids.flatten().tolist())
    fresh = [token for token in range(2, 200) if token not in seen]
    once = [i for i, token in enumerate(ids[0].tolist()) if int((ids == token).sum()) == 1]
    for n, at in enumerate(once[1:-1:2]):
        other[0, at] = fresh[n]
    return model.inputs(dict(given)), model.inputs({**given, name: other})


def examine(class_name: str, task: str) -> dict[str, Any] | None:
    """What became of one class; None when it cannot be built."""
    try:
        built = tiny(class_name, task)
    except CutawayError:
        return None
    about: dict[str, Any] = {"class": class_name, "task": task, "status": "runs", "why": "", "checks": {}}
    if not any(name in built.inputs for name in PROMPTS):
        return about | {"status": "refused", "why": "it reads an image and no prompt"}
    try:
        model = Model(built.hf, name=class_name)
        clean, corrupt = pair(model, built.inputs)
        asked: dict[str, Any] = {"clean": clean, "corrupt": corrupt, "metric": "logit_diff: #11, #22", "steps": 2}
        found = {
            "edges": catalog.run("edges", model, **asked, draws=5, verify=2),
            "faithfulness": catalog.run("faithfulness", model, **asked, draws=5, minimality=1, fractions=[0.1, 1.0]),
        }
    except CutawayError as error:
        return about | {"status": "refused", "why": error.found, "asked": error.asked}
    except Exception as error:  # noqa: BLE001 - whatever a model of a stranger raises belongs into the table
        return about | {"status": "fails", "why": sentence(error)}
    for name, result in found.items():
        about["checks"][name] = result.check.value
        if not result.check.value <= result.check.tolerance:
            about["status"] = "fails"
            about["why"] = f"{name}: {result.check.name}: error {result.check.value:.2g}"
    return about


def counts(found: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How many classes of each task have each status."""
    table: dict[str, dict[str, int]] = {}
    for about in found:
        table.setdefault(about["task"], dict.fromkeys(STATUSES, 0))[about["status"]] += 1
    return table


def main(names: list[str]) -> None:
    """Survey, print the counts, keep the table; classes that are named are only printed."""
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # strangers' models warn about their own insides
    transformers.logging.set_verbosity_error()
    started = time.perf_counter()
    chosen = [(name, task) for name, task in architectures() if not names or name in names]
    found = [about for name, task in track(chosen, "architectures") if (about := examine(name, task)) is not None]
    for about in found:
        if names or about["status"] != "runs":
            print(f"{about['class']:45} {about['task']:19} {about['status']:8} {about['why']} {about['checks']}")
    print(counts(found))
    if not names:
        figures = {"counts": counts(found), "classes": found}
        path = keep("circuits_by_architecture", figures, "edges and faithfulness on tiny models with random weights")
        print(f"{path.name} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
