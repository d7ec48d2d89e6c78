"""Compare what is installed in this environment with constraints.txt: everything must be pinned, and be at its pin.

So a CUDA package that slipped in, or a dependency that nobody pinned, is an error here and not a surprise elsewhere.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
NOT_OURS = {"cutaway", "pip", "setuptools", "wheel"}  # the package itself, and what every environment starts with


def normal(name: str) -> str:
    """A distribution's name in the one spelling that all its spellings share."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    """0 when everything installed is pinned."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pinned = {normal(name): version for name, _, version in (line.partition("==") for line in lines) if version}
    problems = []
    for found in sorted(distributions(), key=lambda one: normal(one.name)):
        name, version = normal(found.name), found.version.partition("+")[0]  # "+cpu" is a build of the same version
        if name not in NOT_OURS and pinned.get(name) != version:
            problems.append(f"{name} {found.version} is installed; constraints.txt has {pinned.get(name, 'no pin')}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
