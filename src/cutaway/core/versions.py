"""Which versions of Python and of the libraries that decide the numbers are running."""

from __future__ import annotations

import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version

_LIBRARIES = ("torch", "transformers", "numpy")


@cache
def _installed() -> dict[str, str]:
    cutaway = sys.modules[__name__.partition(".")[0]]
    found = {"python": platform.python_version(), "cutaway": cutaway.__version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def versions() -> dict[str, str]:
    """Version by name: Python, Cutaway, and the libraries that compute."""
    return dict(_installed())
