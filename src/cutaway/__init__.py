"""Cutaway: see inside language and vision-language models, locate, prove, change, verify, follow."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_FACADE = {
    "Model": "cutaway.models.handle",
    "load": "cutaway.models.load",
    "Inputs": "cutaway.core.inputs",
    "Site": "cutaway.core.site",
    "Trace": "cutaway.core.trace",
    "Metric": "cutaway.core.metric",
    "Intervention": "cutaway.core.intervention",
    "Set": "cutaway.core.intervention",
    "Add": "cutaway.core.intervention",
    "Scale": "cutaway.core.intervention",
    "Zero": "cutaway.core.intervention",
    "Mean": "cutaway.core.intervention",
    "Project": "cutaway.core.intervention",
    "Swap": "cutaway.core.intervention",
    "Apply": "cutaway.core.intervention",
    "Result": "cutaway.core.result",
    "CutawayError": "cutaway.core.errors",
    "run": "cutaway.catalog",
    "rerun": "cutaway.catalog",
    "methods": "cutaway.catalog",
    "doctor": "cutaway.models.doctor",
    "explain": "cutaway.explain",
    "aggregate": "cutaway.aggregation",
}
_RENAMED = {"open": ("cutaway.results", "open_result"), "method": ("cutaway.core.method", "method")}

__all__ = ["__version__", "method", "open", *_FACADE]  # noqa: PLE0604

if TYPE_CHECKING:
    from cutaway.core.method import method
    from cutaway.results import open_result as open


def __getattr__(name: str) -> Any:
    module, attribute = (_FACADE[name], name) if name in _FACADE else _RENAMED.get(name, ("", ""))
    if not module:
        raise AttributeError(f"module 'cutaway' has no attribute {name!r}")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
