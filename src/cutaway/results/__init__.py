"""The result kinds: what every method returns. Importing this package registers them all."""

from cutaway.core.result import Check, Difference, Proof, Provenance, Result
from cutaway.core.result_file import open_result
from cutaway.results.grid import Grid
from cutaway.results.kind import Kind
from cutaway.results.pattern import Pattern
from cutaway.results.readout import Readout

__all__ = [
    "Check",
    "Difference",
    "Grid",
    "Kind",
    "Pattern",
    "Proof",
    "Provenance",
    "Readout",
    "Result",
    "open_result",
]
