"""Compare the generated blocks of docs/ with the code, and the dependency page with pyproject.toml.

A block stands in any page between ``<!-- generated: NAME -->`` and ``<!-- end of NAME -->``; NAME is a key of
``tools.doc_blocks.BLOCKS``. ``python -m tools.check_docs --write`` writes them; without it, a difference is an error.
"""

from __future__ import annotations

import difflib
import re
import sys
import tomllib
from pathlib import Path

from tools.doc_blocks import BLOCKS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w ]+) -->\n).*?(<!-- end of (?P=name) -->)", re.DOTALL)
OPENING = re.compile(r"<!-- generated: ([\w ]+) -->")


def rendered(text: str, made: dict[str, str]) -> str:
    """A page with its blocks as the code has them now."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{made[found['name']]}\n\n{found[3]}", text)


def check_blocks(write: bool) -> list[str]:
    """Pages that differ from the code, brought up to date when ``write``; and blocks that no page shows."""
    made = {name: block() for name, block in BLOCKS.items()}
    problems, shown = [], set()
    for page in sorted(DOCS.rglob("*.md")):
        old = page.read_text(encoding="utf-8")
        opened, closed = OPENING.findall(old), [found["name"] for found in BLOCK.finditer(old)]
        where = page.relative_to(ROOT)
        if opened != closed or not set(opened) <= made.keys():
            problems.append(f"{where}: generated blocks {opened}, of which {closed} are closed; known: {sorted(made)}")
            continue
        shown |= set(opened)
        new = rendered(old, made)
        if new != old and write:
            page.write_text(new, encoding="utf-8")
            print(f"wrote {where}")
        elif new != old:
            lines = difflib.unified_diff(
                old.splitlines(), new.splitlines(), f"{where}", "from the code", lineterm="", n=0
            )
            problems.append("\n".join([*lines, f"{where}: differs from the code; run 'make docs'"]))
    return problems + [f"no page shows the generated block {name!r}" for name in sorted(made.keys() - shown)]


def check_dependencies() -> list[str]:
    """Dependencies of pyproject.toml without a line in docs/dependencies.md, and lines without a dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    names = {re.split(r"[\[<>=!~ ;]", each)[0].lower() for each in asked}
    page = (DOCS / "dependencies.md").read_text(encoding="utf-8")
    lines = {name.lower() for name in re.findall(r"^\| `([\w.-]+)`", page, re.MULTILINE)}
    return [f"docs/dependencies.md has no line for {name}" for name in sorted(names - lines)] + [
        f"docs/dependencies.md names {name}, which pyproject.toml does not" for name in sorted(lines - names)
    ]


def main() -> int:
    """0 when docs/ is in step with the code."""
    problems = check_blocks(write="--write" in sys.argv[1:]) + check_dependencies()
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
