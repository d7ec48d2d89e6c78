"""Commands on graphs that no model is run for: choosing a circuit, and files in the formats of others."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cutaway.cli.options import Delivery, Folder, Loading
from cutaway.cli.output import check_targets, deliver
from cutaway.core.errors import ParameterError, ResultError


class How(StrEnum):
    """How edges are chosen."""

    top = "top"
    threshold = "threshold"
    greedy = "greedy"


class By(StrEnum):
    """What edges are ranked by."""

    size = "size"
    support = "support"


def choose_circuit(
    folder: Folder,
    how: Annotated[How, typer.Option(help="The strongest edges, or from the logits backwards.")] = How.top,
    n: Annotated[int | None, typer.Option(help="How many edges, for top and greedy.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Least strength, for threshold.")] = None,
    by: Annotated[By, typer.Option(help="Size of the score, or how much an edge supports the answer.")] = By.size,
    prune: Annotated[bool, typer.Option(help="Drop edges on no path from embedding to logits.")] = True,
    delivery: Delivery = Delivery(),
) -> None:
    """Choose a circuit among the edges of a saved graph."""
    from cutaway.results import open_result
    from cutaway.results.circuit import circuit
    from cutaway.results.graph import Graph

    check_targets(delivery)
    found = open_result(folder)
    if not isinstance(found, Graph):
        raise ResultError(f"a circuit in {str(folder)!r}", f"it holds a {found.kind}", "give a graph that 'edges' made")
    deliver(circuit(found, how.value, n, threshold, by.value, prune), delivery)


def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A circuit or attribution graph, or a saved result.")],
    model: Annotated[str | None, typer.Option("--model", help="The model that a circuit file has to fit.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="All that a circuit file scores, not its circuit.")] = False,
    loading: Loading = Loading(),
    delivery: Delivery = Delivery(),
) -> None:
    """Read and write graphs in the formats of EAP-IG, MIB, circuit-tracer and Neuronpedia.

    What is read is told by its content; what is written by its ending: .circuit.json, .pt or .attribution.json.
    """
    from cutaway.ops.wiring import Wiring
    from cutaway.results import open_result
    from cutaway.results.graph_formats import is_foreign, read_graph

    check_targets(delivery)
    if not is_foreign(file):
        if model or whole:
            found = "it is a saved result, which says itself what model it is of and is always whole"
            raise ParameterError(f"{'--model' if model else '--whole'} with {str(file)!r}", found, "leave it out")
        deliver(open_result(file), delivery)
        return
    wiring = Wiring.of_model(loading.model(model)) if model else None
    deliver(read_graph(file, wiring, whole), delivery)
