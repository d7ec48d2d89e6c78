"""The parts of docs/ that are written from the code: one function per block, each returning Markdown."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cutaway import catalog
from cutaway.cli import app
from cutaway.core import errors, intervention, metric, site
from cutaway.results import Result
from tools import docs_from_code

T = TypeVar("T")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def first_line(thing: object) -> str:
    """First line of a docstring, without its full stop."""
    return (inspect.getdoc(thing) or "").split("\n")[0].rstrip(".")


def family(base: type[T]) -> Iterator[type[T]]:
    """All subclasses, each before its own, in the order of the source."""
    children: list[type[T]] = base.__subclasses__()
    for child in children:
        yield child
        yield from family(child)


def error_classes() -> str:
    """One section per error class: what it means, what it also is, the exit code of the command line."""
    sections = []
    classes: list[type[errors.CutawayError]] = [errors.CutawayError, *family(errors.CutawayError)]
    for cls in classes:
        if cls.__module__ != errors.__name__:
            continue
        ours = [base.__name__ for base in cls.__bases__ if base.__module__ == errors.__name__]
        builtin = [base.__name__ for base in cls.__bases__ if base.__module__ == "builtins" and base is not Exception]
        links = [f"a kind of [{name}](#{name.lower()})" for name in ours]
        also = [f"caught by `except {name}` too" for name in builtin]
        facts = [*links, *also, f"exit code {cls.exit_code}"]
        sections.append(f"### {cls.__name__}\n\n{first_line(cls)}.\n\n*{'; '.join(facts)}*")
    return "\n\n".join(sections)


def error_tree() -> str:
    """The tree of error classes, as the module's docstring draws it."""
    drawing = [line for line in (errors.__doc__ or "").split("\n") if line.startswith("    ")]
    return "```text\n" + "\n".join(line[4:] for line in drawing) + "\n```"


def site_kinds() -> str:
    """Every kind of site with its axes, what an index chooses, and its equation."""
    rows = [
        [
            f"`{'L*.' if kind.layered else ''}{name}`",
            f"[{', '.join(kind.axes)}]",
            kind.index_axis or "",
            kind.equation,
        ]
        for name, kind in site.KINDS.items()
    ]
    return table(["site", "axes of its tensor", "`[...]` chooses", "what it is"], rows)


def interventions() -> str:
    """Every intervention, its arguments and what it does."""
    rows = []
    for cls in family(intervention.Intervention):
        if not cls.__name__.startswith("_") and cls.__module__ == intervention.__name__:
            arguments = ", ".join(inspect.signature(cls).parameters)
            rows.append([f"`{cls.__name__}({arguments})`", first_line(cls)])
    return table(["intervention", "what it does"], rows)


def metrics() -> str:
    """Every metric: its text form and its unit."""
    tokens = {0: "", 1: ": A", 2: ": A, B", None: ": A, B, ..."}
    return table(["metric", "unit"], [[f"`{name}{tokens[f.n_tokens]}`", f.unit] for name, f in metric.FORMS.items()])


def result_kinds() -> str:
    """Every kind of result, with the first sentence of its docstring."""
    kinds = {name: kind for name, kind in Result.kinds.items() if kind.__module__.startswith("cutaway.results.")}
    return table(["kind", "what it holds"], [[f"`{kind.__name__}`", first_line(kind)] for kind in kinds.values()])


def methods() -> str:
    """Every method by stage, as the catalog finds them, each linked to its page."""
    rows = [
        [head.stage, f"[`{name}`]({name}.md)", head.summary.rstrip(".")]
        for name, head in {**catalog.composed(), **catalog.headlines()}.items()
    ]
    return table(["stage", "method", "what comes out"], rows)


def commands() -> str:
    """Every command that is not a method, with the first line of its help, linked where it has a page."""
    pages = {page.stem for page in (Path(__file__).resolve().parents[1] / "docs" / "methods").glob("*.md")}
    panels: dict[str, Any] = dict(app.FIXED)
    rows = [
        [
            panel,
            f"[`cutaway {name}`](methods/{name}.md)" if name in pages else f"`cutaway {name}`",
            first_line(function),
        ]
        for panel, found in panels.items()
        for name, function in found.items()
    ]
    return table(["", "command", "what it does"], rows)


def figures(name: str) -> Any:
    """The figures of ``benchmarks/results/<name>.json``."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text())["figures"]


def support_counts() -> str:
    """How many classes of each task have each status."""
    found = figures("architectures")["counts"]
    heads = list(next(iter(found.values())))
    return table(["task", *heads], [[task, *(str(row[head]) for head in heads)] for task, row in found.items()])


def support_table() -> str:
    """Every class with its status, and what is refused and why."""
    rows = []
    for each in figures("architectures")["classes"]:
        reasons: dict[str, list[str]] = {}
        for place, why in each["refused"].items():
            reasons.setdefault(why, []).append(f"`{place}`")
        said = [f"{', '.join(places)}: {why}" for why, places in reasons.items()]
        if each["error"] and each["error"] not in reasons:
            said.append(each["error"])
        rows.append([f"`{each['class']}`", each["task"], each["status"], "; ".join(said)])
    return table(["class", "task", "status", "what is refused, and why"], rows)


def circuit_counts() -> str:
    """On how many classes `edges` and `faithfulness` run, by what `cutaway doctor` says of the class."""
    verified = {(c["class"], c["task"]) for c in figures("architectures")["classes"] if c["status"] == "verified"}
    rows: dict[tuple[str, str], list[str]] = {}
    for each in figures("circuits_by_architecture")["classes"]:
        whole = "verified" if (each["class"], each["task"]) in verified else "partly"
        rows.setdefault((each["task"], whole), []).append(each["status"])
    heads = ["task", "status of its sites", "runs", "refused", "breaks, or misses a check"]
    kinds = ("runs", "refused", "fails")
    lines = [[*key, *(str(found.count(kind)) for kind in kinds)] for key, found in sorted(rows.items(), reverse=True)]
    return table(heads, sorted(lines, key=lambda line: line[0]))


def circuit_refusals() -> str:
    """The classes whose sites are all there and whose edges are refused, or miss a check, and why."""
    verified = {(c["class"], c["task"]) for c in figures("architectures")["classes"] if c["status"] == "verified"}
    reasons: dict[str, list[str]] = {}
    for each in figures("circuits_by_architecture")["classes"]:
        if each["status"] != "runs" and (each["class"], each["task"]) in verified:
            reasons.setdefault(each["why"], []).append(f"`{each['class']}`")
    return table(["why", "classes"], [[why, ", ".join(names)] for why, names in sorted(reasons.items())])


def methods_support() -> str:
    """On how many classes of each task each method runs."""
    found = figures("methods")["counts"]
    names = list(dict.fromkeys(name for by_name in found.values() for name in by_name))
    rows = []
    for name in names:
        cells = []
        for by_name in found.values():
            n = by_name.get(name)
            whole = sum(n.values()) if n else 0
            cells += (
                [f"{n['ran']} of {whole}", f"{n['ran'] / whole:.0%}", str(n["failed"] or "")] if n else ["", "", ""]
            )
        rows.append([f"[`{name}`](methods/{name}.md)", *cells])
    heads = [head for task in found for head in (task, "share", "fails")]
    classes = figures("methods")["classes"]
    built = sum("error" not in each for each in classes)
    said = f"{len(classes)} of the {len(figures('architectures')['classes'])} classes were asked; {built} can be built."
    return f"{said}\n\n{table(['method', *heads], rows)}"


def methods_refused() -> str:
    """Every class on which a method does not run, with the reason."""
    rows = []
    for each in figures("methods")["classes"]:
        said = [f"{', '.join(names)}: {why}" for why, names in each["refused"].items()]
        said += [f"{', '.join(names)} *fails*: {why}" for why, names in each["failed"].items()]
        if said or "error" in each:
            rows.append([f"`{each['class']}`", each["task"], "<br>".join(said) or each["error"]])
    return table(["class", "task", "what does not run, and why"], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "error tree": error_tree,
    "error classes": error_classes,
    "site kinds": site_kinds,
    "interventions": interventions,
    "metrics": metrics,
    "result kinds": result_kinds,
    "methods": methods,
    "commands": commands,
    "support counts": support_counts,
    "support table": support_table,
    "circuit counts": circuit_counts,
    "circuit refusals": circuit_refusals,
    "methods support": methods_support,
    "methods refused": methods_refused,
    **docs_from_code.method_blocks(),
}
