"""Graphs in the files of others: what is written is read back, and what does not fit is refused in one sentence."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cutaway import catalog
from cutaway.cli import main
from cutaway.core.errors import MismatchError, ResultError
from cutaway.ops.wiring import Wiring
from cutaway.results import Graph, open_result
from cutaway.results.circuit import circuit
from cutaway.results.circuit_files import _real, from_circuit_json
from cutaway.results.graph_formats import from_networkx, read_graph
from tests.architectures import model

CIRCUIT = [".circuit.json", ".pt"]


@pytest.fixture(scope="module")
def plain() -> Graph:
    return edges("dense")


def edges(name: str) -> Graph:
    given = {"clean": [70, 71, 72, 73], "corrupt": [70, 90, 72, 93], "metric": "logit_diff: #11, #22"}
    found = catalog.run("edges", model(name), **given, steps=2, verify=0)
    assert isinstance(found, Graph)
    return found


def weights(graph: Graph) -> dict[tuple[str, str, str], float]:
    table = graph.table()
    return {(a, b, c): w for a, b, c, w in zip(table.source, table.target, table.into, table.weight, strict=True)}


@pytest.mark.parametrize("ending", CIRCUIT)
def test_circuit_files_are_read_back(plain: Graph, ending: str, tmp_path: Path) -> None:
    read = read_graph(plain.write(tmp_path / f"x{ending}"))
    assert weights(read) == pytest.approx(weights(plain), rel=1e-6)
    assert read.about["d_model"] == 64
    small = circuit(plain, how="greedy", n=20)
    path = small.write(tmp_path / f"y{ending}")
    again = read_graph(path)
    assert weights(again) == pytest.approx(weights(small), rel=1e-6)
    assert f"{len(small.weight)} of 262 edges are in its circuit; those are read" in again.notes[0]
    whole = read_graph(path, whole=True)
    inside = whole.edge_columns["in_graph"]
    assert len(whole.weight) == 262
    assert {key for key, kept in zip(weights(whole), inside, strict=True) if kept} == set(weights(small))
    assert weights(read_graph(whole.write(tmp_path / f"z{ending}"))) == weights(again)


def test_what_is_chosen_from_a_file_in_which_nothing_is_marked_is_in_the_circuit(plain: Graph, tmp_path: Path) -> None:
    held = json.loads(plain.write(tmp_path / "x.circuit.json").read_text())
    for edge in held["edges"].values():
        edge["in_graph"] = False
    (tmp_path / "scores.circuit.json").write_text(json.dumps(held))
    for whole in (False, True):
        read = read_graph(tmp_path / "scores.circuit.json", whole=whole)
        assert weights(read) == pytest.approx(weights(plain), rel=1e-6)
        small = circuit(read, how="greedy", n=20)
        assert weights(read_graph(small.write(tmp_path / "y.circuit.json"))) == weights(small)


@pytest.mark.parametrize("ending", CIRCUIT)
def test_the_circuit_of_a_file_is_what_runs(plain: Graph, ending: str, tmp_path: Path) -> None:
    small = circuit(plain, how="greedy", n=20)
    read = read_graph(small.write(tmp_path / f"x{ending}"), Wiring.of_model(model("dense")))
    given = {"clean": [70, 71, 72, 73], "corrupt": [70, 90, 72, 93], "metric": "logit_diff: #11, #22", "minimality": 0}
    theirs, ours = (catalog.run("faithfulness", model("dense"), graph=each, **given) for each in (read, small))
    assert theirs.about["edges"] == ours.about["edges"]
    assert max(theirs.about["edges"]) == len(small.weight) < theirs.about["all_edges"] == 262
    assert theirs.y[0] == pytest.approx(ours.y[0], abs=1e-6)


def test_the_circuit_json_has_the_names_and_fields_that_eap_ig_reads(plain: Graph, tmp_path: Path) -> None:
    held = json.loads(plain.write(tmp_path / "x.circuit.json").read_text())
    assert held["cfg"] == {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 64}
    assert list(held["nodes"])[:2] == ["input", "a0.h0"]
    assert held["nodes"]["logits"] == {"in_graph": True}
    assert set(held["nodes"]) == {
        "input",
        "logits",
        *(f"a{i}.h{h}" for i in range(3) for h in range(4)),
        "m0",
        "m1",
        "m2",
    }
    assert len(held["edges"]) == 262
    expected = weights(plain)
    assert held["edges"]["a0.h1->a1.h2<k>"] == {
        "score": expected["L0.attn.z[1]", "L1.attn.z[2]", "k"],
        "in_graph": True,
    }
    assert held["edges"]["m0->logits"]["score"] == expected["L0.mlp.out", "logits", ""]


def test_the_pt_has_the_tensors_that_eap_ig_reads(plain: Graph, tmp_path: Path) -> None:
    held = torch.load(plain.write(tmp_path / "x.pt"), weights_only=True)
    assert held["src_nodes"][:6] == ["input", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0"]
    assert held["dst_nodes"][3:6] == ["a0.h3<q>", "a0.h0<k>", "a0.h1<k>"]
    assert held["dst_nodes"][-2:] == ["m2", "logits"]
    assert held["edges_scores"].shape == held["edges_in_graph"].shape == (16, 40)
    assert held["nodes_in_graph"].shape == (16,)
    row, column = held["src_nodes"].index("a0.h1"), held["dst_nodes"].index("a1.h2<v>")
    expected = weights(plain)["L0.attn.z[1]", "L1.attn.z[2]", "v"]
    assert float(held["edges_scores"][row, column]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("ending", CIRCUIT)
def test_shared_keys_are_split_and_summed(ending: str, tmp_path: Path) -> None:
    grouped = edges("grouped-query")
    path = grouped.write(tmp_path / f"x{ending}")
    assert len(read_graph(path).weight) == 262  # as if every head had its own
    read = read_graph(path, Wiring.of_model(model("grouped-query")))
    assert weights(read) == pytest.approx(weights(grouped), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("ending", CIRCUIT)
def test_a_circuit_of_another_model_is_refused(plain: Graph, ending: str, tmp_path: Path) -> None:
    path = plain.write(tmp_path / f"x{ending}")
    with pytest.raises(
        MismatchError, match="is of a model with 3 layers of 4 heads; this one has 3 layers of 4 heads, att"
    ):
        read_graph(path, Wiring.of_model(model("parallel")))
    with pytest.raises(MismatchError, match="this one has 2 layers of 4 heads"):
        read_graph(path, Wiring((4, 4), (4, 4), (False, False)))


def test_circuit_files_that_cannot_be_read_are_refused(plain: Graph, tmp_path: Path) -> None:
    held = json.loads(plain.write(tmp_path / "x.circuit.json").read_text())

    def refused(match: str, **changes: Any) -> None:
        (tmp_path / "bad.circuit.json").write_text(json.dumps({**held, **changes}))
        with pytest.raises(ResultError, match=match):
            read_graph(tmp_path / "bad.circuit.json")

    refused("names an edge a9.h0->logits, which 3 layers of 4 heads do not have", edges={"a9.h0->logits": {"score": 1}})
    refused("edge 'a0.h0' does not read as one", edges={"a0.h0": {"score": 1}})
    refused("does not say how many layers", cfg={})
    refused("chooses neurons", nodes={"m0": {"in_graph": True, "neurons": [True]}})
    refused("edge input->logits has the score nan", edges={"input->logits": {"score": float("nan")}})
    refused("is not what the format has there", edges={"input->logits": {"score": "high"}})
    refused("is not what the format has there", edges=[1])
    refused("is not what the format has there", nodes=[1])
    with pytest.raises(ResultError, match="there is no such file"):
        read_graph(tmp_path / "none.json")
    (tmp_path / "odd.json").write_text('{"a": 1}')
    with pytest.raises(ResultError, match="it holds a; a circuit has cfg and edges"):
        read_graph(tmp_path / "odd.json")
    torch.save({"cfg": {}}, tmp_path / "bad.pt")
    with pytest.raises(ResultError, match="it lacks src_nodes, dst_nodes"):
        read_graph(tmp_path / "bad.pt")
    torch.save({"cfg": Path("code")}, tmp_path / "code.pt")
    with pytest.raises(ResultError, match="cannot be opened without running code"):
        read_graph(tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ResultError, match="it is none that torch wrote"):
        read_graph(tmp_path / "text.pt")
    scored = torch.load(plain.write(tmp_path / "x.pt"), weights_only=True)
    torch.save({**scored, "edges_scores": [1.0]}, tmp_path / "list.pt")
    with pytest.raises(ResultError, match="is not what the format has there"):
        read_graph(tmp_path / "list.pt")


def test_a_circuit_of_a_model_of_gpt2_small_s_size_is_read_in_no_time() -> None:
    wiring = Wiring((12,) * 12, (12,) * 12, (False,) * 12)
    edges = {f"{a}->{b}" + (f"<{into}>" if into else ""): {"score": 1.0} for a, b, into in _real(wiring)}
    held = {"cfg": {"n_layers": 12, "n_heads": 12, "d_model": 768}, "edges": edges}
    start = time.process_time()
    assert len(from_circuit_json(held, "whole").weight) == 32_491
    assert time.process_time() - start < 30.0  # a second; an hour when every edge is looked up in a set of its own


@pytest.mark.parametrize(
    ("part", "broken"),
    [
        ("nodes", {"a": 1}),
        ("nodes", [3]),
        ("links", 3),
        ("links", [[1, 2]]),
        ("links", [{"source": "x"}]),
        ("metadata", [1]),
    ],
)
def test_damaged_attribution_graphs_are_refused(plain: Graph, part: str, broken: Any, tmp_path: Path) -> None:
    path = plain.write(tmp_path / "x.attribution.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), part: broken}))
    with pytest.raises(ResultError, match=r"reading a graph from '.*': a part of it is not what the format has there"):
        read_graph(path)


@pytest.mark.parametrize("name", ["dense", "grouped-query"])
def test_attribution_graphs_are_read_back_and_their_ids_differ(name: str, tmp_path: Path) -> None:
    graph = edges(name)
    path = graph.write(tmp_path / "x.attribution.json")
    held = json.loads(path.read_text())
    assert set(held) == {"metadata", "qParams", "nodes", "links"}
    assert max(Counter(node["node_id"] for node in held["nodes"]).values()) == 1
    assert max(Counter(node["jsNodeId"] for node in held["nodes"]).values()) == 1
    assert max(Counter((n["layer"], n["feature"]) for n in held["nodes"]).values()) == 1
    assert {link["source"] for link in held["links"]} <= {node["node_id"] for node in held["nodes"]}
    assert held["metadata"]["prompt_tokens"] == ["#70", "#71", "#72", "#73"]
    kinds = {node["feature_type"] for node in held["nodes"]}
    assert kinds == {"embedding", "logit", "attention head", "mlp"}
    assert "(p=" in next(node["clerp"] for node in held["nodes"] if node["feature_type"] == "logit")
    read = read_graph(path)
    assert read.nodes.tolist() == graph.nodes.tolist()
    assert weights(read) == pytest.approx(weights(graph))
    assert (read.title, read.unit, read.measure) == (graph.title, graph.unit, graph.measure)
    assert len(circuit(read, n=30, how="greedy").weight) <= 30


def test_attribution_graphs_of_others_are_taken_as_they_are(tmp_path: Path) -> None:
    def node(identity: str, layer: str, kind: str, **more: Any) -> dict[str, Any]:
        return {"node_id": identity, "feature": 7, "layer": layer, "ctx_idx": 1, "feature_type": kind, **more}

    held: dict[str, Any] = {
        "metadata": {"slug": "theirs", "scan": "gemma-2-2b", "prompt_tokens": ["a", "b"], "prompt": "ab"},
        "qParams": {},
        "nodes": [
            node("E_5_1", "E", "embedding", activation=None),
            node("3_7_1", "3", "cross layer transcoder", activation=2.5),
            node("27_9_1", "27", "logit", activation=None),
        ],
        "links": [
            {"source": "E_5_1", "target": "3_7_1", "weight": 0.5},
            {"source": "3_7_1", "target": "27_9_1", "weight": -1.5},
        ],
    }
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(held))
    graph = read_graph(path)
    assert graph.nodes.tolist() == ["E_5_1", "3_7_1", "27_9_1"]
    assert graph.weight.tolist() == [0.5, -1.5]
    assert graph.layer.tolist() == [0, 4, 28]
    np.testing.assert_array_equal(graph.node_columns["activation"], [np.nan, 2.5, np.nan])
    assert graph.about["tokens"] == ("a", "b")
    held["nodes"].append(node("3_7_1", "3", "mlp reconstruction error"))
    path.write_text(json.dumps(held))
    with pytest.raises(ResultError, match="2 nodes have the id '3_7_1', so its links could belong to either"):
        read_graph(path)
    held["nodes"].pop()
    held["links"].append({"source": "9_9_9", "target": "3_7_1", "weight": 1.0})
    path.write_text(json.dumps(held))
    with pytest.raises(ResultError, match="a link ends at '9_9_9', which is no node"):
        read_graph(path)


def test_networkx_graphs_go_both_ways(plain: Graph) -> None:
    import networkx

    read = from_networkx(plain.to_networkx())
    assert weights(read) == weights(plain)
    assert read.nodes.tolist() == plain.nodes.tolist()
    assert read.layer.tolist() == plain.layer.tolist()
    assert (read.title, read.unit, read.measure, read.about) == (plain.title, plain.unit, plain.measure, plain.about)
    other = networkx.DiGraph()
    other.add_edge("a", "b", weight=2.0)
    other.add_edge("b", 3)
    assert from_networkx(other).table().weight.tolist() == [2.0, 1.0]
    with pytest.raises(ResultError, match="it has no directions"):
        from_networkx(networkx.Graph())


def test_the_command_line_chooses_and_converts(
    plain: Graph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = plain.save(tmp_path / "edges")
    chosen = tmp_path / "chosen"
    assert main(["circuit", str(saved), "--how", "greedy", "--n", "20", "--out", str(chosen)]) == 0
    found = open_result(chosen)
    assert found.same_as(circuit(plain, how="greedy", n=20)).lines == ()
    there = tmp_path / "x.circuit.json"
    assert main(["convert", str(chosen), "--out", str(there)]) == 0
    back = tmp_path / "back"
    assert main(["convert", str(there), "--out", str(back), "--out", str(tmp_path / "x.attribution.json")]) == 0
    read = open_result(back)
    assert isinstance(read, Graph)
    assert weights(read) == pytest.approx(weights(found), rel=1e-6)
    assert main(["convert", str(there), "--whole", "--out", str(tmp_path / "whole")]) == 0
    assert len(open_result(tmp_path / "whole").weight) == 262
    assert main(["convert", str(chosen), "--whole"]) == 2
    assert "--whole with" in capsys.readouterr().err
    assert main(["convert", str(there), "--model", "circuit-induction"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is of a model with 3 layers of 4 heads; this one has 2 layers of 4 heads" in said
    assert main(["circuit", str(saved), "--how", "threshold", "--threshold", "1000000"]) == 1
    assert "no edge from the embedding to the logits" in " ".join(capsys.readouterr().err.split())
