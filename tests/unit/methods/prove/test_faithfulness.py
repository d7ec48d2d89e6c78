"""Circuits whose edges are known do all that the model does, and nothing is left without them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cutaway
from cutaway import catalog, specimens
from cutaway.core.errors import MismatchError, ParameterError, ResultError
from cutaway.models.handle import Model
from cutaway.ops.areas import cmd, cpr
from cutaway.ops.wiring import Wiring
from cutaway.results import Graph, Series
from cutaway.results.circuit import circuit
from tests.architectures import model

GIVEN = {"clean": [70, 71, 72, 73], "corrupt": [70, 90, 72, 93], "metric": "logit_diff: #11, #22"}
KEPT, RANDOM, WITHOUT, WITHOUT_RANDOM, LEAST = range(5)


def faithfulness(of: Model, **params: Any) -> Series:
    found = catalog.run("faithfulness", of, **{**GIVEN, **params})
    assert isinstance(found, Series)
    assert found.check is not None
    assert found.check.holds
    return found


def edges(of: Model, **params: Any) -> Graph:
    found = catalog.run("edges", of, **{**GIVEN, "steps": 2, "verify": 0, **params})
    assert isinstance(found, Graph)
    return found


def wired(name: str, every: int) -> tuple[Model, dict[str, Any], set[tuple[str, str, str]]]:
    """A hand-wired model, prompts with their answers, and its edges."""
    of, card = cutaway.load(name), specimens.card(name)
    examples = card.examples[::every]
    given = {"clean": [each["prompt"] for each in examples], "answers": [each["answer"] for each in examples]}
    true = {tuple(edge) for edge in card.truths["edges"]}
    return of, {**given, "corrupt": None, "metric": None}, true


@pytest.mark.parametrize(("name", "every"), [("circuit-induction", 1), ("circuit-ioi", 12)])
def test_a_wired_circuit_does_all_that_the_model_does(name: str, every: int) -> None:
    of, given, true = wired(name, every)
    everything = Wiring.of_model(of)
    source, target, into = everything.ends
    weights = [
        (everything.nodes[a], everything.nodes[b], c) in true for a, b, c in zip(source, target, into, strict=True)
    ]
    graph = Graph(
        nodes=everything.nodes,
        source=source,
        target=target,
        weight=np.array(weights, dtype=float),
        edge_columns={"into": into},
        about=everything.sizes,
    )
    sizes = [(len(true) + 0.5) / len(everything), 1.0]
    found = faithfulness(of, **given, graph=graph, fractions=sizes, minimality=len(true))
    assert found.about["edges"][0] == len(true)
    assert found.y[KEPT, 0] == pytest.approx(1, abs=0.02)
    assert found.y[WITHOUT, 0] < 0.1
    assert found.hi[RANDOM, 0] < 0.5
    if name == "circuit-induction":  # of the others in circuit-ioi some do without each other
        assert found.y[LEAST, 0] > 0.9
        assert found.proof is not None
        assert found.proof.holds


def test_all_edges_are_the_model_and_none_are_nothing() -> None:
    found = faithfulness(model("dense"), fractions=[0.001, 1.0])
    np.testing.assert_allclose(found.y[[KEPT, RANDOM], 1], 1, atol=1e-5)
    np.testing.assert_allclose(found.y[[KEPT, RANDOM], 0], 0, atol=1e-5)
    np.testing.assert_allclose(found.y[[WITHOUT, WITHOUT_RANDOM], 0], 1, atol=1e-5)
    np.testing.assert_allclose(found.y[[WITHOUT, WITHOUT_RANDOM], 1], 0, atol=1e-5)


def test_edges_found_here_are_those_of_the_method_edges() -> None:
    of = model("grouped-query")
    here = faithfulness(of, steps=2, fractions=[0.1, 0.3], minimality=0)
    given = faithfulness(of, graph=edges(of), fractions=[0.1, 0.3], minimality=0)
    assert here.same_as(given, rtol=1e-5).lines == ()
    other = edges(of).replace(weight=-np.abs(edges(of).weight)[::-1])
    assert faithfulness(of, graph=other, fractions=[0.1, 0.3], minimality=0).same_as(given).lines


def test_a_circuit_is_measured_up_to_its_own_size() -> None:
    of = model("dense")
    chosen = circuit(edges(of), n=30, how="greedy")
    found = faithfulness(of, graph=chosen, fractions=[0.05, 0.5, 1.0])
    assert found.about["edges"][1:] == (len(chosen.weight),) * 2
    assert found.y[KEPT, 1] == found.y[KEPT, 2]


def test_random_edges_that_were_drawn_twice_count_once() -> None:
    of = model("dense")
    last = (
        len(edges(of).nodes) - 1
    )  # no other edge is as the one from the embedding to the logits: it is drawn each time
    alone = edges(of).replace(source=[0], target=[last], weight=[1.0], edge_columns={"into": [""]})
    proof = faithfulness(of, graph=alone, fractions=[0.01]).proof
    assert proof is not None
    assert proof.sentence.endswith("p <= 2/2, since only 1 of the draws differ)")
    assert faithfulness(of, fractions=[0.1]).proof.distinct == 5


def test_areas_are_those_of_the_benchmark() -> None:
    sizes, curve = np.array([0.1, 0.5, 1.0]), np.array([0.5, 1.5, 1.0])
    assert cpr(sizes, curve) == pytest.approx(0.4 * 1.0 + 0.5 * 1.25)
    assert cmd(sizes, curve) == pytest.approx(0.4 * 0.5 + 0.5 * 0.25)
    found = faithfulness(model("dense"), fractions=[0.1, 0.5, 1.0])
    assert found.line_columns["CPR"][KEPT] == pytest.approx(cpr(found.x, found.y[KEPT]))
    assert found.line_columns["CMD"][KEPT] == pytest.approx(cmd(found.x, found.y[KEPT]))


def test_what_cannot_be_measured_is_refused_in_one_sentence() -> None:
    of = model("dense")
    with pytest.raises(MismatchError, match="12 heads in all; this one has 3 layers of 4 heads \\(2 with keys"):
        faithfulness(model("grouped-query"), graph=edges(of))
    with pytest.raises(ParameterError, match="both the clean run and the one with everything replaced"):
        faithfulness(of, metric="logit_diff: #11, #22 @0")  # before the two differ
    with pytest.raises(MismatchError, match="clean and corrupt prompts: they are the same in row 0"):
        faithfulness(of, corrupt=GIVEN["clean"])
    apart = edges(of).replace(source=[0], target=[1], weight=[1.0], edge_columns={"into": ["q"]})
    with pytest.raises(ResultError, match="none of its 1 edges lies on a path from the embedding to the logits"):
        faithfulness(of, graph=apart)
    with pytest.raises(MismatchError, match="row 0 has 4 and 3 tokens"):
        faithfulness(of, corrupt=[70, 90, 72])
