"""What each kind computes or refuses, apart from drawing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from cutaway.core.errors import ResultError
from cutaway.results import Graph, Grid, ImageMap, Pattern, Ranking, Readout, Result, Series, Table
from cutaway.results.imagemap import png_size
from cutaway.results.page import proof_spec
from tests.unit.results.examples import EXAMPLES, PROOF, png


def test_ranking_sorts_columns_along_and_puts_missing_last() -> None:
    ranking = Ranking(items=["a", "b", "c", "d"], scores=[1.0, np.nan, 3.0, -4.0], columns={"n": [1, 2, 3, 4]})
    assert ranking.sites == ("c", "a", "d", "b")
    assert ranking.columns["n"].tolist() == [3, 1, 4, 2]
    assert ranking.replace(order="absolute").sites == ("d", "c", "a", "b")
    assert ranking.replace(order="ascending").sites == ("d", "a", "c", "b")


def test_equal_scores_keep_their_order() -> None:
    assert Ranking(items=["b", "a", "c"], scores=[1.0, 1.0, 2.0]).sites == ("c", "b", "a")


def test_top_is_a_ranking_of_the_first() -> None:
    ranking = EXAMPLES["ranking"]
    assert isinstance(ranking, Ranking)
    top = ranking.top(2)
    assert top.sites == ranking.sites[:2] == ("L1.mlp.act[2]", "L0.mlp.act[1]")
    assert top.columns["layer"].tolist() == [1, 0]
    assert top.proof is ranking.proof
    assert ranking.top(99) == ranking.replace(order="given")


def test_pattern_table_reads_heads() -> None:
    previous = np.zeros((1, 2, 3, 3))
    previous[0, 0, [0, 1, 2], [0, 0, 1]] = 1.0  # every token looks at the one before it
    previous[0, 1] = 1 / 3
    table = Pattern(pattern=previous, labels={"head": (4, 7)}).table()
    assert table["head"].tolist() == [4, 7]
    assert table["previous"].tolist() == pytest.approx([1.0, 1 / 3])
    assert table["first"].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert table["entropy"].tolist() == pytest.approx([0.0, np.log(3)])


def test_readout_table_has_probabilities_and_the_target() -> None:
    table = EXAMPLES["readout"].table()
    assert table["probability"].to_numpy() == pytest.approx(np.exp(table["log_prob"]))
    assert {"target_log_prob", "target_rank"} <= set(table.columns)
    assert len(table) == 32


def test_graph_goes_to_networkx() -> None:
    graph = EXAMPLES["graph"]
    assert isinstance(graph, Graph)
    net = graph.to_networkx()
    assert net.edges["embed", "L0.attn.z[1]", 0] == {"weight": 1.0, "into": "q"}
    assert net.nodes["logits"]["layer_number"] == 2
    assert net.number_of_edges() == 4


def test_image_map_boxes_cover_the_image() -> None:
    image = ImageMap(image=png(6, 4), values=np.zeros((2, 3)))
    assert image.size == (6, 4)
    assert image.values.shape == (1, 2, 3)
    assert image.boxes[0, 0].tolist() == [0, 0, 2, 2]
    assert image.boxes[1, 2].tolist() == [4, 2, 6, 4]


def test_a_large_photo_is_kept_small_and_boxes_stay_in_its_own_pixels() -> None:
    photo = Image.new("RGB", (4000, 3000))
    image = ImageMap(image=ImageMap.png(photo), values=np.zeros((3, 4)), pixels=photo.size)
    assert png_size(image.image.tobytes()) == (1024, 768)
    assert image.size == (4000, 3000)
    assert image.boxes[2, 3].tolist() == [3000, 2000, 4000, 3000]
    assert photo.size == (4000, 3000)
    x = image.spec()["concat"][0]["layer"][0]["encoding"]["x"]
    assert x["scale"]["domain"] == [0, 4000]


def test_maps_say_how_they_agree() -> None:
    maps = [[[1.0, 2.0], [np.nan, 4.0]], [[10.0, 20.0], [30.0, 40.0]], [[1.0, 1.5], [0.0, -9.0]], [[7.0] * 2] * 2]
    image = ImageMap(image=png(), values=maps, labels={"map": tuple("abcd")}, figures={"share": 0.5})
    table = image.agreement().set_index(["map", "other"])
    assert len(table) == 6
    assert table.loc[("a", "b")].tolist() == pytest.approx([1, 1, True])
    assert table.loc[("a", "c"), "spearman"] == pytest.approx(-0.5)
    assert not table.loc[("a", "c"), "same_top"]
    assert np.isnan(table.loc[("a", "d"), "pearson"])
    assert image.figures["share"] == 0.5


def test_maps_share_one_scale_unless_asked() -> None:
    image = ImageMap(image=png(), values=[[[1.0]], [[10.0]]])

    def highest(spec: dict) -> list[float]:
        return [panel["layer"][1]["encoding"]["color"]["scale"]["domain"][-1] for panel in spec["concat"][1:]]

    assert highest(image.spec()) == [10.0, 10.0]
    assert highest(image.spec(own_scale=True)) == [1.0, 10.0]


def test_long_table_names_repeated_tokens_by_their_place() -> None:
    table = EXAMPLES["grid"].table()
    assert list(table.columns) == ["layer", "position_index", "position", "value"]
    twice = table[table["position"] == " Ada"]
    assert sorted(set(twice["position_index"])) == [1, 7]


def test_the_proof_has_its_own_curve() -> None:
    spec = proof_spec(EXAMPLES["ranking"])
    rows = spec["data"]["values"]
    named = [row["y"] for row in rows if row["line"] == "named here"]
    assert named == PROOF.effect.tolist()
    assert [row["hi"] for row in rows if row["line"] != "named here"] == PROOF.random.max(axis=0).tolist()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Grid(values=[1.0], axes=("layer",)), "two or three different names"),
        (lambda: Grid(values=[[1.0]], axes=("layer", "layer")), "two or three different names"),
        (lambda: Grid(values=[[1.0]], axes=("layer", "head"), scale="rainbow"), "'diverging' or 'sequential'"),
        (lambda: Grid(values=[[1.0]], axes=("layer", "head")).spec(panel=1), "one panel"),
        (lambda: Ranking(items=["a"], scores=[1.0], order="random"), "descending, ascending, absolute, given"),
        (lambda: Ranking(items=["a"], scores=[1.0], labels={"item": ["b"]}), "use columns"),
        (lambda: Ranking(items=["a"], scores=[1.0], columns={"layer": [1]}).spec(beside="layr"), "'layer'"),
        (lambda: Readout(tokens=[[["a"]]], ids=[[[1]]], log_probs=[[[0.0]]], target="a"), "both or neither"),
        (lambda: EXAMPLES["readout"].replace(target="", target_log_prob=None).spec(target=True), "no target"),
        (lambda: Series(x=[1, 2], y=[[1.0, 2.0]], lo=[[0.0, 1.0]]), "both or neither"),
        (lambda: Series(x=[1, np.inf], y=[[1.0, 2.0]]), "not finite"),
        (lambda: Series(x=[0, 1], y=[[1.0, 2.0]], log_x=True), "above zero"),
        (lambda: Table(columns={"a": [1]}, units={"b": "nats"}), "no such column"),
        (lambda: Table(columns={"a": [1], "b": [1, 2]}), "has 2 along 'row', another array 1"),
        (lambda: Graph(nodes=["a", "a"], source=[], target=[], weight=[]), "two nodes are called 'a'"),
        (lambda: Graph(nodes=["a", "b"], source=[0], target=[2], weight=[1.0]), "node 2; there are nodes 0 to 1"),
        (lambda: ImageMap(image=b"GIF89a", values=[[1.0]]), "not a PNG"),
        (lambda: ImageMap(image=png(), values=[[1.0]], boxes=[[[0.0, 1.0]]]), "left, top, right, bottom"),
        (lambda: proof_spec(EXAMPLES["grid"]), "this grid has none"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], Result], said: str) -> None:
    with pytest.raises(ResultError, match=said):
        make()
