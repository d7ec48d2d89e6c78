"""What docs/methods/NAME.md says about a method's signature, written from the code.

Each page holds a block ``<!-- generated: method NAME -->`` ... ``<!-- end of method NAME -->``. ``python -m
tools.docs_from_code`` says what is out of step; ``--write`` brings it up to date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cutaway import catalog
from cutaway.cli.method_command import flag_of
from cutaway.core.method import Method

DOCS = Path(__file__).resolve().parents[1] / "docs"


def block(name: str, text: str) -> str:
    """``text`` between the marks of a method's block."""
    return f"<!-- generated: method {name} -->\n\n{text}\n\n<!-- end of method {name} -->"


def method_blocks() -> dict[str, Callable[[], str]]:
    """For each method the name of its block, and what makes its text."""
    return {f"method {name}": partial(_block_of, name) for name in every()}


def every() -> list[str]:
    """The names of what has a page: all methods, and what is composed of them."""
    return [*catalog.composed(), *catalog.headlines()]


def _block_of(name: str) -> str:
    return method_block(catalog.get(name))


def method_block(record: Method) -> str:
    """Summary, stage, kind of result, sources, command line and parameters of a method."""
    facts = [f"Stage **{record.stage}**"] if record.stage else ["Made of several methods"]
    facts += [f"returns a [{record.kind.__name__}](../concepts/results.md)"]
    facts += [f"follows {', '.join(record.cites)}"] if record.cites else []
    text = "\n\n".join(
        [record.summary, " · ".join(facts), f"```console\n{synopsis(record)}\n```", parameter_table(record)]
    )
    return re.sub(r"(?<!`)``(?!`)", "`", text)


def synopsis(record: Method) -> str:
    """The command with all its options; those that may be left out in brackets."""
    parts = []
    for parameter in record.parameters.values():
        flag = flag_of(parameter)
        parts.append(flag if parameter.required else f"[{flag}]")
    return " \\\n    ".join([f"$ cutaway {record.name} MODEL", *parts])


def parameter_table(record: Method) -> str:
    """A Markdown table of the parameters; a sentence when there is none."""
    if not record.parameters:
        return "It takes no parameter but the model."
    lines = ["| parameter | how it is written | default | |", "| --- | --- | --- | --- |"]
    for name, parameter in record.parameters.items():
        default = "required" if parameter.required else f"`{parameter.default_text}`" if parameter.default_text else ""
        cells = [f"`{name}`", parameter.form.says, default, parameter.help]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """The generated text of each page, by its path in docs/."""
    return {f"methods/{name}.md": _block_of(name) for name in every()}


def problems(docs: Path = DOCS, write: bool = False) -> list[str]:
    """Pages that are missing or differ from the code, and parameters that no docstring explains."""
    found = []
    for path, text in pages().items():
        name, page = Path(path).stem, docs / path
        unsaid = [p.name for p in catalog.get(name).parameters.values() if not p.help]
        if unsaid:
            found.append(f"{name}: its docstring's Args say nothing of {', '.join(unsaid)}")
        if not page.exists():
            found.append(f"docs/{path}: there is no such page")
            continue
        old = page.read_text(encoding="utf-8")
        before, opening, rest = old.partition(f"<!-- generated: method {name} -->")
        _, closing, after = rest.partition(f"<!-- end of method {name} -->")
        if not (opening and closing):
            found.append(f"docs/{path}: it has no block 'method {name}'")
            continue
        new = before + block(name, text) + after
        if new != old and write:
            page.write_text(new, encoding="utf-8")
        elif new != old:
            found.append(f"docs/{path}: differs from the code; run 'make docs'")
    return found


def main() -> int:
    """0 when the pages are in step with the code."""
    found = problems(write="--write" in sys.argv[1:])
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
