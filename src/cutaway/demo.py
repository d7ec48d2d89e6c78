"""A first look, on models that come with Cutaway: why one states a fact, why another answers about an image, and proof.

``python -m cutaway.demo [FOLDER]`` leaves two reports, a page for each further step, and one page that leads to them.
"""

from __future__ import annotations

import html
import sys
from pathlib import Path

from cutaway import catalog
from cutaway.core.errors import CutawayError
from cutaway.core.result import Result
from cutaway.core.result_file import PAGE
from cutaway.data import Scenes, Town
from cutaway.explain import explain
from cutaway.models.doctor import doctor
from cutaway.models.load import load
from cutaway.results.explanation import Explanation

STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.55 system-ui,sans-serif;margin:3rem auto;max-width:44rem;padding:0 1rem}
a{color:inherit}li{margin:.8rem 0}
code{background:color-mix(in srgb,currentColor 9%,transparent);padding:.1em .3em;border-radius:4px}
"""


def explanations(folder: Path) -> dict[str, Explanation]:
    """Why a fact of the town is stated, and why a question about a scene, kept in ``folder``, is answered so."""
    town, scenes = load("town"), load("scenes")
    pair = Town().pairs("city", count=1, length=lambda text: town.inputs(text).ids.shape[1])[0]
    scene, question = Scenes(seed=0).exam(1, "colour")[0]
    image = folder / "scene.png"
    scene.image().save(image)
    return {"fact": explain(town, pair.clean.prompt), "image": explain(scenes, question.prompt, image=str(image))}


def steps() -> dict[str, tuple[str, Result]]:
    """Further steps by name: what each asks, and its result."""
    model = load("town")
    pair = Town().pairs("city", count=1, length=lambda text: model.inputs(text).ids.shape[1])[0]
    metric = f'logit_diff: "{pair.clean.answer}", "{pair.corrupt.answer}"'
    prompts = {"clean": pair.clean.prompt, "corrupt": pair.corrupt.prompt, "metric": metric}
    return {
        "doctor": ("Is what we read what the model computes?", doctor(model)),
        "patch_residual": (
            f"Which states carry the fact? The prompt “{pair.corrupt.prompt}” receives them.",
            catalog.run("patch", model, **prompts),
        ),
    }


def write(folder: Path) -> dict[str, Path]:
    """Explain, run the further steps, and write all of it under ``folder``: the pages by name, the front page first."""
    folder.mkdir(parents=True, exist_ok=True)
    front, lines, pages = folder / "index.html", [], {}
    for name, told in explanations(folder).items():
        pages[name] = told.save(folder / name, overwrite=True) / PAGE
        asked = f"“{told.prompt}” → “{told.target.strip()}”"
        lines.append(f'<li>{html.escape(asked)}<br><a href="{name}/{PAGE}">{html.escape(told.title)}</a></li>')
    for name, (question, result) in steps().items():
        result.write(folder / f"{name}.html")
        result.save(folder / "results" / name, overwrite=True)
        lines.append(f'<li>{html.escape(question)}<br><a href="{name}.html">{html.escape(result.title)}</a></li>')
    again = html.escape(str(folder / "fact"))
    front.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Cutaway: a first look</title><style>{STYLE}</style><h1>A first look</h1>"
        "<p>Two small models that come with Cutaway: <code>town</code>, trained on facts about invented people, and "
        "<code>scenes</code>, which sees coloured shapes.</p>"
        f"<ol>{''.join(lines)}</ol>"
        f"<p>Results are kept: <code>cutaway rerun {again}</code> makes one again and compares.</p>",
        encoding="utf-8",
    )
    return {"front": front, **pages}


def main(arguments: list[str] | None = None) -> int:
    """Write the demo; the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        pages = write(Path(given[0] if given else "out/demo"))
    except CutawayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"why town states a fact:                    {pages['fact']}")
    print(f"why scenes answers a question on an image: {pages['image']}")
    print(f"Open {pages['front']} in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
