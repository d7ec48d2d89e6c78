"""A first look, on a model that comes with Cutaway: verify it, see inside, prove what carries a fact.

``python -m cutaway.demo [FOLDER]`` leaves a page for each step and one that leads to them.
"""

from __future__ import annotations

import html
import sys
from pathlib import Path

from cutaway import catalog
from cutaway.core.errors import CutawayError
from cutaway.core.result import Result
from cutaway.data import Town
from cutaway.models.doctor import doctor
from cutaway.models.load import load

STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.55 system-ui,sans-serif;margin:3rem auto;max-width:44rem;padding:0 1rem}
a{color:inherit}li{margin:.8rem 0}
code{background:color-mix(in srgb,currentColor 9%,transparent);padding:.1em .3em;border-radius:4px}
"""


def steps() -> dict[str, tuple[str, Result]]:
    """Name of each step: what it asks, and its result."""
    model = load("town")
    pair = Town().pairs("city", count=1, length=lambda text: model.inputs(text).ids.shape[1])[0]
    metric = f'logit_diff: "{pair.clean.answer}", "{pair.corrupt.answer}"'
    prompts = {"clean": pair.clean.prompt, "corrupt": pair.corrupt.prompt, "metric": metric}
    asked = f"“{pair.clean.prompt}” should go on with “{pair.clean.answer}”"
    return {
        "doctor": ("Is what we read what the model computes?", doctor(model)),
        "logit_lens": (
            f"What would each layer say? {asked}.",
            catalog.run("logit_lens", model, prompt=pair.clean.prompt, target=pair.clean.answer),
        ),
        "attention": (
            "Where do its heads look?",
            catalog.run("attention_pattern", model, prompt=pair.clean.prompt),
        ),
        "patch_residual": (
            f"Which states carry the answer? The prompt “{pair.corrupt.prompt}” receives them.",
            catalog.run("patch", model, **prompts),
        ),
        "patch_heads": (
            "Which heads carry it?",
            catalog.run("patch", model, **prompts, kind="attn.z", by="head"),
        ),
    }


def write(folder: Path) -> Path:
    """Run every step, write its page and its result under ``folder``, and give the page that leads to them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, (question, result) in steps().items():
        result.write(folder / f"{name}.html")
        result.save(folder / "results" / name, overwrite=True)
        check = f"<br><small>{html.escape(str(result.check))}</small>" if result.check else ""
        lines.append(
            f'<li>{html.escape(question)}<br><a href="{name}.html">{html.escape(result.title)}</a>{check}</li>'
        )
    front = folder / "index.html"
    again = html.escape(str(folder / "results" / "patch_residual"))
    front.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Cutaway: a first look</title><style>{STYLE}</style><h1>A first look at <code>town</code></h1>"
        "<p>A small Llama-shaped model that comes with Cutaway. It was trained on facts about invented people.</p>"
        f"<ol>{''.join(lines)}</ol><p>Each result is kept under <code>results/</code>: "
        f"<code>cutaway rerun {again}</code> makes it again and compares.</p>",
        encoding="utf-8",
    )
    return front


def main(arguments: list[str] | None = None) -> int:
    """Write the demo; the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        front = write(Path(given[0] if given else "out/demo"))
    except CutawayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"Open {front} in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
