"""The result kinds: what every method returns. Importing this package registers them all."""

from cutaway.core.result import Check, Difference, Proof, Provenance, Result
from cutaway.core.result_file import open_result
from cutaway.results.explanation import Explanation
from cutaway.results.graph import Graph
from cutaway.results.grid import Grid
from cutaway.results.imagemap import ImageMap
from cutaway.results.kind import Kind
from cutaway.results.pattern import Pattern
from cutaway.results.ranking import Ranking
from cutaway.results.readout import Readout
from cutaway.results.series import Series
from cutaway.results.table import Table

__all__ = [
    "Check",
    "Difference",
    "Explanation",
    "Graph",
    "Grid",
    "ImageMap",
    "Kind",
    "Pattern",
    "Proof",
    "Provenance",
    "Ranking",
    "Readout",
    "Result",
    "Series",
    "Table",
    "open_result",
]
