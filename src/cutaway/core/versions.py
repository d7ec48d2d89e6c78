"""Which versions of Python and of the libraries that decide the numbers are running."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

_LIBRARIES = ("cutaway", "torch", "transformers", "numpy")


@cache
def _installed() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def versions() -> dict[str, str]:
    """Version by name: Python, Cutaway, and the libraries that compute."""
    return dict(_installed())
