"""What every method gives on every architecture of the installed transformers: figures for docs/support.md.

    python benchmarks/methods_survey.py                                  # the whole matrix, kept under results/
    python benchmarks/methods_survey.py --classes LlamaForCausalLM --methods patch,ablate     # printed only

Each method runs its own example on a tiny model with random weights. A model of images and texts gets one image and
the example's words behind it, where the method takes an image. Sites that the example names move to the next layer that
has them, and neurons to those of an expert where there is no other MLP. Models are surveyed in batches, each batch in a
process of its own, so that one which breaks the interpreter, or does not come back, costs no other.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.harness import RESULTS, keep
from cutaway import catalog
from cutaway.core.errors import CutawayError
from cutaway.core.forms.data import PromptForm
from cutaway.core.inputs import Inputs, PatchGrid
from cutaway.core.method import Method
from cutaway.core.result import Result
from cutaway.core.site import Items, Site, parse_sites
from cutaway.models.handle import Model
from cutaway.models.tiny import TASKS, TinyModel, architectures, tiny
from cutaway.results.explanation import Explanation

NOTE = "the methods' examples, with their proofs, on tiny models with random weights"
BATCH = 12  # classes that share a process
LIMIT = 300.0  # seconds that a class may take, before its process is ended
SIDE = 16  # pixels, of the image that image_patches draws on
IMAGE_TEXT = TASKS[1]
ELSEWHERE = ("aggregate", "edges", "faithfulness")
"""aggregate runs another method; the other two are surveyed with the rest of circuits."""


def surveyed() -> dict[str, Method]:
    """The methods of the survey by name."""
    names = [*catalog.headlines(), *catalog.composed()]
    return {name: catalog.get(name) for name in names if name not in ELSEWHERE}


def sees(record: Method) -> bool:
    """Whether a method takes an image."""
    return any(parameter.form.name == "image" for parameter in record.parameters.values())


def needs_image(record: Method) -> bool:
    """Whether a method has nothing to say of a prompt without an image."""
    return "image" in record.example


def asked(methods: Mapping[str, Method], task: str) -> list[str]:
    """The methods that are run on classes of a task."""
    return [name for name, record in methods.items() if task == IMAGE_TEXT or not needs_image(record)]


# -- one method on one model -------------------------------------------------------------------------------------------
def example(record: Method, model: Model, built: TinyModel) -> dict[str, Any]:
    """The method's example, in terms of one tiny model; with its proof, where the example leaves that out."""
    found: dict[str, Any] = {}
    for name, text in record.example.items():
        form = record.parameters[name].form.name
        if form == "image" or name == "draws":
            continue
        if form in ("prompt", "prompts") and built.task == IMAGE_TEXT and sees(record):
            found[name] = with_image(model, built, [int(w[1:]) for w in text.split() if w[1:].isdigit()])
        elif form == "sites":
            prompt = next(found[p] for p in ("prompt", "clean", "prompts") if p in found)
            found[name] = [moved(model, site, prompt) for site in parse_sites(text)]
        else:
            found[name] = text
    return found


def with_image(model: Model, built: TinyModel, words: Sequence[int]) -> Inputs:
    """The tiny model's own inputs with ``words`` at the end, and an image laid out over its image positions."""
    features = dict(built.inputs)
    name = "decoder_input_ids" if "decoder_input_ids" in features else "input_ids"
    if words:
        features[name] = torch.cat([features[name][:, : -len(words)], torch.tensor([words])], dim=1)
    inputs = model.inputs(features)
    places = [p for p, role in enumerate(inputs.roles[0]) if role == "image"]
    if not places:
        return inputs
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    return replace(inputs, images=(Image.fromarray(noise),), grids=(one_row(places),))


def one_row(places: Sequence[int]) -> PatchGrid:
    """A grid of one row: which pixels a position stands for is the processor's to say, and no tiny model has one."""
    edges = torch.linspace(0, SIDE, len(places) + 1)
    top, bottom = torch.zeros(len(places)), torch.full((len(places),), float(SIDE))
    boxes = torch.stack([edges[:-1], top, edges[1:], bottom], dim=1)
    return PatchGrid(row=0, positions=tuple(places), boxes=boxes, shape=(1, len(places)))


def moved(model: Model, site: Site, prompt: Any) -> Site:
    """The site at the next layer that has its kind; for neurons, an expert's where a layer has no others.

    One neuron becomes the layer's most active one: where activations are rectified, most are off.
    """
    layers = model.layers
    one = site.index is not None and [a for a, b in site.index if a == b] == [a for a, _ in site.index][:1]
    for i in sorted(range(len(layers)), key=lambda i: (i < site.layer, i)):
        here = replace(site, layers=Items.of(i))
        if layers[i].has(site.kind):
            return here.at(index=most(model, here, prompt)) if site.kind == "mlp.act" and one else here
        if site.kind == "mlp.act" and layers[i].has("expert.act"):
            expert = most(model, replace(here, kind="expert.gate"), prompt)
            return replace(here, kind="expert.act", index=Items.of(expert), inner=site.index)
    return site


def most(model: Model, site: Site, prompt: Any) -> int:
    """Which neuron or expert of a layer has the largest number at the last position."""
    inputs = model.inputs(PromptForm().value(PromptForm().accept(prompt), model))
    whole = site.whole().at(positions=-1)
    return int(model.trace(inputs, want=whole, stop=True)[whole][0, 0].abs().argmax())


def verdict(record: Method, model: Model, built: TinyModel) -> tuple[str, str]:
    """("ran" | "refused" | "failed", why)."""
    try:
        result = record.run(model, **example(record, model, built))
    except CutawayError as error:
        return "refused", error.found
    except Exception as error:  # noqa: BLE001 - what breaks is what the survey is for
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    wrong = "; ".join(faults(result))
    return ("failed", wrong) if wrong else ("ran", "")


def faults(result: Result) -> Iterator[str]:
    """What is wrong with a result: a check that does not hold, numbers that are none, a part that broke."""
    if result.check is not None and not result.check.holds:
        yield str(result.check)
    for name, data in result.arrays().items():
        if data.dtype.kind == "f" and data.size and (np.isinf(data).any() or np.isnan(data).all()):
            yield f"{name} {list(data.shape)} holds no finite numbers"
    if isinstance(result, Explanation):
        for name, part in result.parts.items():
            yield from (f"{name}: {fault}" for fault in faults(part))
        yield from (f"{name}: {why}" for name, why in result.refused.items() if why.startswith("it broke"))


# -- one architecture --------------------------------------------------------------------------------------------------
def survey_class(class_name: str, task: str, methods: Mapping[str, Method]) -> dict[str, Any]:
    """What each method gave: ``ran`` names, and the names by reason of those ``refused`` and ``failed``."""
    row: dict[str, Any] = {"class": class_name, "task": task, "ran": [], "refused": {}, "failed": {}}
    started = time.process_time()
    try:
        built = tiny(class_name, task)
    except CutawayError as error:
        return row | {"error": f"it cannot be built: {error.found}"}
    model = Model(built.hf, name=class_name)
    for name in asked(methods, task):
        status, why = verdict(methods[name], model, built)
        if status == "ran":
            row["ran"].append(name)
        else:
            row[status].setdefault(why, []).append(name)
    return row | {"seconds": round(time.process_time() - started, 1)}


def work(methods: Mapping[str, Method]) -> None:
    """The process of one batch: a (class, task) per line comes in, a row per line goes out."""
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # strangers' models warn about their own insides
    transformers.logging.set_verbosity_error()
    out, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        class_name, task = json.loads(line)
        print(json.dumps(survey_class(class_name, task, methods)), file=out, flush=True)


# -- all of them -------------------------------------------------------------------------------------------------------
def run(pairs: Sequence[tuple[str, str]], names: Sequence[str], jobs: int) -> list[dict[str, Any]]:
    """A row per (class, task), in their order; ``jobs`` processes at a time."""
    batches: queue.SimpleQueue[list[tuple[str, str]]] = queue.SimpleQueue()
    for i in range(0, len(pairs), BATCH):
        batches.put(list(pairs[i : i + BATCH]))
    rows: dict[tuple[str, str], dict[str, Any]] = {}

    def serve() -> None:
        while True:
            try:
                left = batches.get_nowait()
            except queue.Empty:
                return
            while left:
                for row in _batch(left, names):
                    rows[left.pop(0)] = row
                    print(told(row), flush=True)

    threads = [threading.Thread(target=serve) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [rows[pair] for pair in pairs]


def _batch(pairs: Sequence[tuple[str, str]], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of the first pairs, as many as one process answers; of the one that ended it, a row that says so."""
    command = [sys.executable, __file__, "--work", "--methods", ",".join(names)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        stdin: Any = process.stdin
        stdout: Any = process.stdout
        stdout.readline()  # imports are no class's time
        for class_name, task in list(pairs):
            timer = threading.Timer(LIMIT, process.kill)
            timer.start()
            try:
                stdin.write(json.dumps([class_name, task]) + "\n")
                stdin.flush()
                line = stdout.readline()
            except BrokenPipeError:
                line = ""
            timer.cancel()
            if not line:
                why = f"no answer within {LIMIT:g} s" if timer.finished.is_set() else "the interpreter ended"
                yield {"class": class_name, "task": task, "ran": [], "refused": {}, "failed": {why: list(names)}}
                process.kill()
                return
            yield json.loads(line)


def told(row: Mapping[str, Any]) -> str:
    """A row on one line, and a line for each failure."""
    n = [len(row["ran"]), *(sum(map(len, row[status].values())) for status in ("refused", "failed"))]
    head = f"{row['class']} {row['task']}: ran {n[0]}, refused {n[1]}, failed {n[2]}, {row.get('seconds', '?')} s"
    lines = [f"    {why}: {', '.join(names)}" for why, names in row["failed"].items()]
    return "\n".join([head + (f" ({row['error']})" if "error" in row else ""), *lines])


def counts(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """How many classes of each task a method ran on, refused and failed on: {task: {method: {status: number}}}."""
    found: dict[str, dict[str, Counter[str]]] = {}
    for row in rows:
        table = found.setdefault(row["task"], {})
        for status in ("ran", "refused", "failed"):
            named = row["ran"] if status == "ran" else [name for names in row[status].values() for name in names]
            for name in named:
                table.setdefault(name, Counter(ran=0, refused=0, failed=0))[status] += 1
    return {task: {name: dict(n) for name, n in table.items()} for task, table in found.items()}


def figures(rows: Sequence[Mapping[str, Any]], methods: Mapping[str, Method]) -> dict[str, Any]:
    """What is kept: counts, which methods were asked, and per class those that did not run, by reason."""
    classes = [{key: value for key, value in row.items() if key != "ran"} for row in rows]
    return {
        "counts": counts(rows),
        "asked": {task: asked(methods, task) for task in TASKS},
        "seconds": round(sum(row.get("seconds", 0.0) for row in rows)),
        "classes": classes,
    }


def with_earlier(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, and those that were kept before of classes that are not among them."""
    new = {(row["class"], row["task"]): dict(row) for row in rows}
    if len(new) < len(architectures()):
        before = json.loads((RESULTS / "methods.json").read_text())["figures"]
        for row in before["classes"]:
            out = {name for status in ("refused", "failed") for names in row[status].values() for name in names}
            ran = [] if "error" in row else [name for name in before["asked"][row["task"]] if name not in out]
            new.setdefault((row["class"], row["task"]), row | {"ran": ran})
    return [new[pair] for pair in architectures() if pair in new]


def main() -> None:
    """Survey, print a line per class, keep the table when everything was surveyed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", default="", help="some classes of transformers; all when none are named")
    parser.add_argument("--methods", default="", help="some methods; all when none are named")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--keep", action="store_true", help="put the rows of --classes into what was kept before")
    parser.add_argument("--out", type=Path, help="a file for the rows")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    methods = surveyed()
    if given.methods:
        methods = {name: catalog.get(name) for name in given.methods.split(",")}
    if given.work:
        work(methods)
        return
    wanted = given.classes.split(",") if given.classes else []
    pairs = [pair for pair in architectures() if not wanted or pair[0] in wanted]
    started = time.perf_counter()
    rows = run(pairs, list(methods), given.jobs)
    found = figures(rows, methods)
    for task, table in found["counts"].items():
        for name, n in table.items():
            print(f"{task:19} {name:21} " + ", ".join(f"{status} {count}" for status, count in n.items()))
    print(f"{len(rows)} classes, {found['seconds']} s of processor time, {time.perf_counter() - started:.0f} s")
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1))
    if not given.methods and (given.keep or not wanted):
        keep("methods", figures(with_earlier(rows), methods), NOTE)


if __name__ == "__main__":
    main()
