"""Start a method: ``python -m tools.new_method NAME --stage STAGE`` writes the function, its test and its page.

The three run as they are: a small method that measures the residual stream, to be replaced by the one that is meant.
"""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import re
import sys
from pathlib import Path

from cutaway import catalog
from cutaway.core.method import STAGES, Method
from tools.docs_from_code import block, method_block

ROOT = Path(__file__).resolve().parents[1]

METHOD = '''"""{title}."""

from __future__ import annotations

from cutaway.core.method import method
from cutaway.core.params import Prompt
from cutaway.models.handle import Model
from cutaway.results.grid import Grid


@method(example={{"prompt": "#1 #2 #3"}})
def {name}(model: Model, prompt: Prompt) -> Grid:
    """Length of the residual stream that leaves each layer, at each position.

    Args:
        prompt: what the model reads.
    """
    inputs = model.inputs(prompt)
    trace = model.trace(inputs, want="L*.resid_post")
    return Grid(
        title="{title}",
        values=trace.stack("L*.resid_post")[:, 0].norm(dim=-1),
        axes=("layer", "position"),
        labels={{"position": inputs.tokens[0]}},
        measure="length",
        unit="residual units",
        scale="sequential",
    )
'''

TEST = """from __future__ import annotations

import numpy as np
import torch

import cutaway

IDS = [1, 2, 3]


def test_lengths_are_those_of_hugging_faces_hidden_states() -> None:
    model = cutaway.load("planted-llama")
    found = cutaway.run("{name}", model, prompt=IDS)
    with torch.no_grad():
        states = model.hf(torch.tensor([IDS]), output_hidden_states=True).hidden_states
    # The first is the embedding; the last has passed the final norm.
    expected = [state[0].norm(dim=-1).numpy() for state in states[1:-1]]
    np.testing.assert_allclose(found.values[:-1], expected, rtol=1e-6)
"""

PAGE = """# {title}

{block}

## What it computes

For each layer *l* and position *p*, the Euclidean length of `L*.resid_post`.

## How to read it

A jump from one layer to the next is where the model writes much at once.
"""


def files(name: str, stage: str) -> dict[Path, str]:
    """The text of each file to write, by its path from the root."""
    title = name.replace("_", " ").capitalize()
    return {
        Path(f"src/cutaway/methods/{stage}/{name}.py"): METHOD.format(name=name, title=title),
        Path(f"tests/unit/methods/{stage}/test_{name}.py"): TEST.format(name=name),
        Path(f"docs/methods/{name}.md"): PAGE.format(title=title, block=block(name, "")),
    }


def problem(name: str, stage: str, root: Path) -> str:
    """Why the method cannot be started; '' when it can."""
    if stage not in STAGES:
        return f"there is no stage {stage!r}: the stages are {', '.join(STAGES)}"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        return f"{name!r} is no name for a function: write it as small_letters_and_underscores"
    if name in catalog.headlines():
        return f"there is a method {name!r} already, in {catalog.headlines()[name].module}"
    taken = [str(path) for path in files(name, stage) if (root / path).exists()]
    return f"{', '.join(taken)} exists: nothing is overwritten" if taken else ""


def write(name: str, stage: str, root: Path) -> list[Path]:
    """Writes the three files, and the packages they lie in; returns their paths."""
    made = files(name, stage)
    for path, text in made.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    source, _, page = made
    described = block(name, method_block(record(name, stage, root / source)))
    (root / page).write_text(made[page].replace(block(name, ""), described), encoding="utf-8")
    for package in ("src/cutaway/methods", f"src/cutaway/methods/{stage}"):
        init = root / package / "__init__.py"
        if not init.exists():
            init.write_text("", encoding="utf-8")
    return list(made)


def record(name: str, stage: str, source: Path) -> Method:
    """The record of a method read from its file."""
    spec = importlib.util.spec_from_file_location(f"{catalog.PACKAGE}.{stage}.{name}", source)
    if spec is None or spec.loader is None:
        raise ImportError(f"{source} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Method = getattr(module, name).method
    return found


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """0 when the files are written, 2 when one is in the way or the name will not do."""
    parser = argparse.ArgumentParser(prog="new_method", description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("name")
    parser.add_argument("--stage", required=True, help=f"one of {', '.join(STAGES)}")
    asked = parser.parse_args(argv)
    refusal = problem(asked.name, asked.stage, root)
    if refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    for path in write(asked.name, asked.stage, root):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
