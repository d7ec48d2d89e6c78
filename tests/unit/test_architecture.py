"""The shape of the house, read from the source: which way imports point, how long modules are, what no file holds."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src"

# Each tier may import those before it; units of one tier do not import each other.
TIERS = (
    ("core",),
    ("ops",),
    ("results",),
    ("models",),
    ("engine",),
    ("dictionaries",),
    ("methods",),
    ("explain",),
    ("catalog", "store"),
    ("aggregation",),
    ("cli", "server", "demo"),
)
LEAVES = {"data": {"core"}, "specimens": {"core", "data"}}  # asked by anything but core; asking only these
FACADE = ""  # cutaway/__init__.py: it hands out names of every unit, so only the front ends may ask it for them
FRONT_ENDS = set(TIERS[-1])
HEAVY = {"transformers", "pandas", "altair", "xarray", "scipy"}

LINES = 500
MEDIAN_LINES = 150
TABLE_MARK = "# A data table:"  # in a module's first lines: its length is the length of what it lists


def allowed(unit: str) -> set[str]:
    """The units that ``unit`` may import."""
    if unit in LEAVES:
        return LEAVES[unit]
    before: set[str] = set()
    for tier in TIERS:
        if unit in tier:
            return before | (set() if unit == "core" else set(LEAVES)) | ({FACADE} if unit in FRONT_ENDS else set())
        before |= set(tier)
    if unit in (FACADE, "__main__"):
        return before | set(LEAVES) | {FACADE}
    message = f"cutaway.{unit} has no place in the order of imports: {TIERS}, {sorted(LEAVES)}"
    raise KeyError(message)


class Import(NamedTuple):
    module: str  # what is imported, by its full name
    line: int
    at_top: bool  # runs when the importing module is imported


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def unit_of(module: str) -> str:
    """``core`` for ``cutaway.core.site``; the facade for a name that ``cutaway/__init__.py`` itself defines."""
    parts = module.split(".")
    if len(parts) == 1:
        return FACADE
    return parts[1] if f"cutaway.{parts[1]}" in modules() or (SRC / "cutaway" / parts[1]).is_dir() else FACADE


def imports(name: str, path: Path) -> Iterator[Import]:
    """Every import of a module, those inside functions included."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node, at_top in statements(tree.body, at_top=True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_top)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                stem = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*stem, base] if base else stem)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, at_top)


def statements(body: list[ast.stmt], *, at_top: bool) -> Iterator[tuple[ast.stmt, bool]]:
    """Every statement under ``body``, and whether it runs when the module is imported."""
    for statement in body:
        yield statement, at_top
        lazy = isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef) or for_type_checkers(statement)
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(statement, field, []), at_top=at_top and not (lazy and field == "body"))
        for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
            yield from statements(part.body, at_top=at_top)


def for_type_checkers(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test)


def every_import() -> Iterator[tuple[str, Path, Import]]:
    for name, path in modules().items():
        for found in imports(name, path):
            yield name, path, found


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


@cache
def tracked() -> list[Path]:
    """Every file under version control."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_the_package_is_found() -> None:
    assert {"cutaway", "cutaway.core.errors"} <= modules().keys()


def test_imports_point_left() -> None:
    wrong = [
        f"{place(path, found.line)}: {name} imports {found.module}"
        for name, path, found in every_import()
        if found.module.split(".")[0] == "cutaway"
        and unit_of(found.module) != unit_of(name)
        and unit_of(found.module) not in allowed(unit_of(name))
    ]
    assert not wrong, "\n".join(wrong)


def test_a_method_never_imports_a_method() -> None:
    def method_of(module: str) -> str | None:
        parts = module.split(".")  # cutaway.methods.<stage>.<method>...
        return ".".join(parts[2:4]) if parts[:2] == ["cutaway", "methods"] and len(parts) > 3 else None

    wrong = [
        f"{place(path, found.line)}: {name} imports {found.module}"
        for name, path, found in every_import()
        if method_of(name) and method_of(found.module) not in (None, method_of(name))
    ]
    assert not wrong, "\n".join(wrong)


def test_values_and_results_do_not_know_transformers() -> None:
    wrong = [
        place(path, found.line)
        for name, path, found in every_import()
        if unit_of(name) in ("core", "results") and found.module.split(".")[0] == "transformers"
    ]
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_are_imported_inside_functions() -> None:
    wrong = [
        f"{place(path, found.line)}: {found.module}"
        for _, path, found in every_import()
        if found.at_top and found.module.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_importing_the_package_loads_no_heavy_library() -> None:
    program = "import sys, cutaway; print(cutaway.__file__); print(*sorted(m for m in sys.modules if '.' not in m))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    file, loaded = run.stdout.strip().split("\n")
    assert Path(file) == SRC / "cutaway" / "__init__.py"
    assert not HEAVY & set(loaded.split())


def test_no_module_is_a_drawer_for_the_rest() -> None:
    drawers = {"utils", "util", "helpers", "misc", "common"}
    assert not [name for name in modules() if drawers & set(name.split("."))]


def test_no_bare_assert() -> None:
    wrong = [
        place(path, node.lineno)
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_are_short() -> None:
    lengths = {}
    for path in modules().values():
        lines = path.read_text(encoding="utf-8").splitlines()
        if not any(line.startswith(TABLE_MARK) for line in lines[:5]):
            lengths[str(path.relative_to(ROOT))] = len(lines)
    assert not {path: count for path, count in lengths.items() if count > LINES}
    assert statistics.median(lengths.values()) <= MEDIAN_LINES


# A path of one machine, or the host of a package registry: neither means anything to the next reader.
FOREIGN = re.compile(
    r"(?:^|[^\w.])/(?:work|tmp|root|home|opt|Users)/"
    r"|\bpypi\.org|\bpythonhosted\.org|\bregistry\.npmjs|\bdownload\.pytorch\.org|\bconda\.anaconda\.org"
    r"|--(?:extra-)?index[-]url|--find[-]links",
    re.MULTILINE,
)


def test_no_machine_path_or_registry_host_is_tracked() -> None:
    wrong = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" in data[:4096]:
            continue
        wrong += [
            f"{place(path, number)}: {line.strip()[:100]}"
            for number, line in enumerate(data.decode("utf-8").splitlines(), 1)
            if FOREIGN.search(line)
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("unit", "other", "may"),
    [
        ("methods", "engine", True),
        ("engine", "methods", False),
        ("catalog", "store", False),
        ("data", "core", True),
        ("core", "data", False),
        ("specimens", "data", True),
        ("models", "specimens", True),
        ("cli", FACADE, True),
        ("methods", FACADE, False),
    ],
)
def test_the_order_says_who_may_import_whom(unit: str, other: str, *, may: bool) -> None:
    assert (other in allowed(unit)) is may


def test_imports_are_read_wherever_they_stand(tmp_path: Path) -> None:
    source = """
        import torch
        if TYPE_CHECKING:
            from cutaway.models import Model
        try:
            from ..ops import topk
        except ImportError:
            import a.b
        class C:
            import c
            def f(self):
                with x:
                    from . import site as s
                    match x:
                        case 1: import deep
    """
    path = tmp_path / "thing.py"
    path.write_text("\n".join(line[8:] for line in source.splitlines()), encoding="utf-8")
    found = {(one.module, one.at_top) for one in imports("cutaway.core.thing", path)}
    assert found == {
        ("torch", True),
        ("cutaway.models.Model", False),
        ("cutaway.ops.topk", True),
        ("a.b", True),
        ("c", True),
        ("cutaway.core.site", False),
        ("deep", False),
    }
