"""Pictures at their edges: empty, one cell, missing numbers, many cells, strange tokens; and the rules of the look."""

from __future__ import annotations

import json

import numpy as np
import pytest
import vl_convert

from cutaway.core.errors import ResultError
from cutaway.results import Graph, Grid, ImageMap, Pattern, Ranking, Readout, Series, Table, drawing
from cutaway.results.graph_drawing import GAPS, PLATE, RISES, STRAND
from cutaway.results.layout import layered, ranks
from cutaway.results.telling import pictures
from tests.unit.results.examples import png


def readout(*shape: int) -> Readout:
    return Readout(tokens=np.full(shape, "a", dtype=object), ids=np.zeros(shape, int), log_probs=np.zeros(shape))


EDGES = {
    "empty grid": Grid(values=np.zeros((0, 4)), axes=("layer", "head")),
    "one cell": Grid(values=[[0.5]], axes=("layer", "head")),
    "all missing": Grid(values=np.full((2, 2), np.nan), axes=("layer", "head")),
    "all zero": Grid(values=np.zeros((2, 2)), axes=("layer", "head")),
    "constant": Grid(values=np.full((2, 2), 3.0), axes=("layer", "head"), scale="sequential"),
    "long": Grid(
        values=np.ones((48, 200)), axes=("layer", "position"), labels={"position": [f" token{i}" for i in range(200)]}
    ),
    "empty pattern": Pattern(pattern=np.zeros((0, 2, 3, 3))),
    "one position": Pattern(pattern=np.ones((1, 1, 1, 1))),
    "only the last query": Pattern(pattern=np.full((1, 2, 1, 4), 0.25)),
    "many heads": Pattern(pattern=np.full((12, 12, 4, 4), 0.25)),
    "empty readout": readout(0, 0, 0),
    "no top": readout(1, 2, 0),
    "long readout": readout(48, 200, 1),
    "empty ranking": Ranking(items=[], scores=[]),
    "unmeasured item": Ranking(items=["L0.attn.z[1]"], scores=[np.nan]),
    "empty series": Series(x=[], y=np.zeros((2, 0))),
    "one point": Series(x=[1], y=[[2.0]]),
    "many lines": Series(x=[0, 1], y=np.arange(24.0).reshape(12, 2)),
    "empty table": Table(),
    "no rows": Table(columns={"a": [], "b": []}),
    "long table": Table(columns={f"column {i}": np.arange(500) for i in range(20)}),
    "no edges": Graph(nodes=["embed", "logits"], source=[], target=[], weight=[]),
    "no nodes": Graph(nodes=[], source=[], target=[], weight=[]),
    "one patch": ImageMap(image=png(), values=[[0.3]], scale="sequential"),
}


@pytest.mark.parametrize("name", list(EDGES))
def test_edges_draw_and_print(name: str) -> None:
    result = EDGES[name]
    svg = vl_convert.vegalite_to_svg(json.dumps(result.spec(), allow_nan=False))
    assert "NaN" not in svg
    assert result.summary() is not None
    assert len(result.view().to_dict()) > 0
    if not result.spec()["data"]["values"] or drawing.EMPTY in json.dumps(result.spec()):
        assert drawing.EMPTY in svg


def test_long_axes_are_thinned_so_that_labels_do_not_touch() -> None:
    spec = EDGES["long"].spec()
    place = spec["layer"][0]["encoding"]
    for channel, pixels in (("x", spec["width"]["step"]), ("y", spec["height"]["step"])):
        values = place[channel]["axis"]["values"]
        assert np.diff(values).min() * pixels >= drawing.LABEL_PIXELS
    assert spec["width"]["step"] * 200 <= 1000


def test_missing_cells_keep_their_place_and_lose_their_colour() -> None:
    grid = Grid(values=[[np.nan, 1.0]], axes=("layer", "head"))
    rows = grid.spec()["data"]["values"]
    assert [row["value"] for row in rows] == [None, 1.0]
    grey = drawing.INKS["light"]["missing"]
    assert grey in vl_convert.vegalite_to_svg(json.dumps(grid.spec()))
    full = Grid(values=[[2.0, 1.0]], axes=("layer", "head"))
    assert grey not in vl_convert.vegalite_to_svg(json.dumps(full.spec()))


def test_the_error_of_a_mean_is_in_the_table_and_where_one_points() -> None:
    grid = Grid(values=[[[2.0, 1.0]]], standard_error=[[[0.25, np.nan]]], axes=("statistic", "layer", "head"))
    assert [row["shown"] for row in grid.spec()["data"]["values"]] == ["2 ± 0.25", "1 ± nan"]
    assert [row["shown"] for row in grid.spec(panel=0)["data"]["values"]] == ["2 ± 0.25", "1 ± nan"]
    assert grid.table()["standard_error"].tolist()[0] == 0.25
    assert Grid(values=[[2.0]], axes=("layer", "head")).spec()["data"]["values"][0]["shown"] == "2"


def test_signed_colours_are_centred() -> None:
    spec = Grid(values=[[-0.2, 3.0]], axes=("layer", "head")).spec()
    scale = spec["layer"][1]["encoding"]["color"]["scale"]
    assert scale["domain"] == [-3.0, 3.0]
    assert scale["domainMid"] == 0.0
    sequential = Grid(values=[[1.0, 3.0]], axes=("layer", "head"), scale="sequential").spec()
    assert sequential["layer"][1]["encoding"]["color"]["scale"]["domain"] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (" Ada", "·Ada"),
        ("  ", "··"),
        ("a b ", "a b·"),
        ("\n\t", "⏎⇥"),
        ("\x00\u202e", "\\x00\\x202e"),
        ("👩‍🚀", "👩‍🚀"),
        ("", ""),
        ("x" * 30, "x" * 17 + "…"),
    ],
)
def test_whitespace_and_controls_are_visible(token: str, text: str) -> None:
    assert drawing.shown(token) == text


def test_both_ramps_rise_in_lightness_on_their_paper() -> None:
    def lightness(color: str) -> float:
        r, g, b = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.2126 * r**2.2 + 0.7152 * g**2.2 + 0.0722 * b**2.2

    for name, ink in drawing.INKS.items():
        ramp = [lightness(each) for each in ink["ramp"]]
        falling = name == "light"
        assert ramp == sorted(ramp, reverse=falling)
        signed = [lightness(each) for each in ink["diverging"]]
        middle = len(signed) // 2
        assert signed[: middle + 1] == sorted(signed[: middle + 1], reverse=not falling)
        assert signed[middle:] == sorted(signed[middle:], reverse=falling)


def test_a_readout_writes_tokens_only_where_they_fit() -> None:
    wide = Readout(tokens=[[[" Paris"]]], ids=[[[1]]], log_probs=[[[-0.1]]])
    assert "·Paris" in vl_convert.vegalite_to_svg(json.dumps(wide.spec()))
    assert all("cell" not in row for row in EDGES["long readout"].spec()["data"]["values"])


def test_graph_layers_are_longest_paths() -> None:
    source, target = np.array([0, 1, 0, 2]), np.array([1, 2, 2, 3])
    assert ranks(4, source, target).tolist() == [0, 1, 2, 3]
    with pytest.raises(ResultError, match="circle"):
        ranks(2, np.array([0, 1]), np.array([1, 0]))


def test_nodes_of_a_layer_do_not_overlap() -> None:
    rng = np.random.default_rng(0)
    height = np.repeat(np.arange(6), 7)
    widths = rng.uniform(20, 90, size=len(height))
    links = [(int(a), int(b)) for a, b in rng.integers(0, len(height), (200, 2)) if height[a] < height[b]]
    drawn = layered(height, links, widths, gap=10.0)
    x, row, total = drawn.x, drawn.row, drawn.width
    for level in range(6):
        at = np.flatnonzero(row == level)
        at = at[np.argsort(x[at])]
        left, right = x[at] - widths[at] / 2, x[at] + widths[at] / 2
        assert (left[1:] - right[:-1] >= 10.0 - 1e-9).all()
        assert left.min() >= -1e-9
        assert right.max() <= total + 1e-9


def test_edges_pass_between_the_nodes_on_their_way() -> None:
    height = np.array([0, 1, 1, 1, 2, 3])
    links = [(0, 4), (0, 5), (1, 5), (0, 2), (4, 5)]
    drawn = layered(height, links, np.full(6, 40.0), gap=10.0)
    for a, b in links:
        path = drawn.path(a, b)
        assert path[0] == (drawn.x[a], height[a])
        assert path[-1] == (drawn.x[b], height[b])
        channel = path[len(path) // 2][0]
        for other in range(6):
            if height[a] < height[other] < height[b]:
                assert abs(channel - drawn.x[other]) >= 20.0
    beside = drawn.path(1, 2)
    assert max(level for _, level in beside) > 1.0


def curve(points: list[tuple[float, float]]) -> np.ndarray:
    """[n, 2] places along the B-spline that the picture draws through control points."""
    ends = [points[0]] * 2 + points + [points[-1]] * 2
    t = np.linspace(0, 1, 20)[:, None]
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    return np.concatenate([(weights * np.array(ends[i : i + 4])[:, None]).sum(0) for i in range(len(ends) - 3)])


@pytest.mark.parametrize("rise", RISES)
def test_no_edge_of_two_hundred_runs_behind_a_node(rise: float) -> None:
    rng = np.random.default_rng(1)
    height = np.repeat(np.arange(12), 6)
    widths = rng.uniform(60, 90, size=len(height))
    links = [(int(a), int(b)) for a, b in rng.integers(0, len(height), (420, 2)) if height[a] < height[b]][:200]
    drawn = layered(height, links, widths, gap=GAPS[0])
    tall = PLATE / 2 / rise
    for n, (a, b) in enumerate(links):
        x, row = curve(drawn.path(a, b, beside=(n % 5 - 2) * STRAND)).T
        for other in set(range(len(height))) - {a, b}:
            inside = (np.abs(row - drawn.row[other]) < tall) & (np.abs(x - drawn.x[other]) < widths[other] / 2)
            assert not inside.any(), (a, b, other)


def test_a_row_is_as_near_to_its_neighbours_as_it_can_be_on_both_sides() -> None:
    height = np.array([0] * 9 + [1])
    drawn = layered(height, [(i, 9) for i in range(9)], np.full(10, 20.0), gap=10.0)
    assert drawn.x[:9].mean() == pytest.approx(drawn.x[9])
    few = layered(np.array([0] * 9 + [1] * 3), [(4, 9), (4, 10), (4, 11)], np.full(12, 20.0), gap=10.0)
    assert few.x[9:].mean() == pytest.approx(few.x[4])


def parts(spec: drawing.Spec, name: str) -> list[dict[str, object]]:
    return [row for row in spec["data"]["values"] if row["part"] == name]


def flow(weights: tuple[float, ...] = (0.1, 0.6, 0.3, 1.0), about: dict[str, object] | None = None) -> Graph:
    return Graph(
        nodes=["L0.resid_pre@3", "L0.resid_pre@1", "L0.resid_pre@0", "L0.resid_mid@3", "L0.resid_post@3"],
        source=[0, 1, 2, 3],
        target=[3, 3, 3, 4],
        weight=weights,
        layer=[0, 0, 0, 1, 2],
        node_columns={"position": [3, 1, 0, 3, 3], "token": ["in", " Ada", "<s>", "in", "in"]},
        edge_columns={"kind": ["stays", "head", "head", "mlp"], "head": [-1, 2, 1, -1]},
        about=about or {},
    )


def test_nodes_with_positions_stand_in_columns_in_the_order_of_tokens() -> None:
    spec = flow().spec()
    at = {row["name"]: row["x"] for row in parts(spec, "node")}
    assert at["L0.resid_pre@0"] < at["L0.resid_pre@1"] < at["L0.resid_pre@3"]
    assert at["L0.resid_pre@3"] == at["L0.resid_mid@3"] == at["L0.resid_post@3"]
    tokens = parts(spec, "column")
    assert [row["text"] for row in tokens] == ["<s>", "·Ada", "in"]
    assert [row["x"] for row in tokens] == [at[f"L0.resid_pre@{t}"] for t in (0, 1, 3)]
    assert [row["text"] for row in parts(spec, "row")] == ["L0.resid_pre", "L0.resid_mid", "L0.resid_post"]
    assert [row["text"] for row in parts(spec, "head")] == ["head 2", "head 1"]
    whole = flow(about={"tokens": ["<s>", " Ada", " lives", "in"]}).spec()
    assert [row["text"] for row in parts(whole, "column")] == ["<s>", "·Ada", "·lives", "in"]
    short = flow(about={"tokens": ["<s>", " Ada"]}).spec()
    assert [row["text"] for row in parts(short, "column")] == ["<s>", "·Ada", "3"]


def test_tokens_wider_than_their_columns_stand_upright() -> None:
    many = {"tokens": [f" token{i}" for i in range(60)]}
    angles = [
        next(each["mark"].get("angle") for each in graph.spec()["layer"] if "'column'" in str(each["transform"]))
        for graph in (flow(), flow(about=many))
    ]
    assert angles == [None, 270]


def test_edges_of_several_kinds_have_their_colours_and_negative_ones_are_dashed() -> None:
    spec = flow((0.1, -0.6, 0.3, 1.0)).spec()
    (line,) = [each for each in spec["layer"] if each["mark"]["type"] == "line"]
    assert line["encoding"]["color"]["scale"]["domain"] == ["head", "mlp", "stays"]
    assert "negative" in line["encoding"]["strokeDash"]["condition"]["test"]
    assert any("1 at the thickest; dashed where negative" in each for each in spec["title"]["subtitle"])
    assert not any("dashed" in each for each in flow().spec()["title"]["subtitle"])


def test_edges_between_the_same_two_nodes_lie_side_by_side() -> None:
    twice = Graph(
        nodes=["a@0", "b@0"],
        source=[0, 0],
        target=[1, 1],
        weight=[1.0, 2.0],
        layer=[0, 1],
        node_columns={"position": [0, 0]},
    )
    found = {row["edge"]: set() for row in parts(twice.spec(), "edge")}
    for row in parts(twice.spec(), "edge"):
        found[row["edge"]].add(row["x"])
    assert len(found[1]) == 1  # the strongest runs straight
    assert len(found[0]) == 2


def test_what_the_nodes_of_a_row_share_is_written_once() -> None:
    graph = Graph(
        nodes=["embed", "L0.attn.z[0]", "L0.attn.z[11]", "L0.mlp.out"],
        source=[0, 0, 1, 2],
        target=[1, 2, 3, 3],
        weight=[1.0, 2.0, 3.0, 4.0],
    )
    spec = graph.spec()
    assert [row["node"] for row in parts(spec, "node")] == ["embed", "0", "11", "L0.mlp.out"]
    assert [row["text"] for row in parts(spec, "row")] == ["L0.attn.z"]
    assert {row["from"] for row in parts(spec, "edge")} == {"embed", "L0.attn.z[0]", "L0.attn.z[11]"}


def test_a_legend_says_the_areas_under_its_lines_and_a_logarithmic_axis_its_round_numbers() -> None:
    y = np.array([[0.0, 0.5, 1.0], [0.0, 0.1, 1.0]])
    series = Series(
        x=[0.001, 0.07, 1.0],
        y=y,
        lo=y - 0.1,
        hi=y + 0.1,
        log_x=True,
        labels={"line": ("circuit", "random")},
        line_columns={"CPR": [0.91, np.nan]},
        interval="smallest and largest",
    )
    spec = series.spec()
    encoding = spec["layer"][1]["encoding"]
    assert encoding["color"]["scale"]["domain"] == ["circuit · CPR 0.91", "random"]
    assert encoding["x"]["axis"]["values"] == [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    assert "bands: smallest and largest" in spec["title"]["subtitle"]
    svg = vl_convert.vegalite_to_svg(json.dumps(spec))
    assert all(f">{text}<" in svg for text in ("0.002", "0.05", "0.5", "1"))
    assert "bands" not in json.dumps(series.replace(lo=None, hi=None).spec())


def test_panels_stand_under_each_other_when_tokens_have_no_room_beside() -> None:
    def columns(tokens: int, labelled: bool) -> int:
        labels = {"position": [f"t{i}" for i in range(tokens)]} if labelled else {}
        return Grid(values=np.ones((2, 3, tokens)), axes=("kind", "layer", "position"), labels=labels).spec()["columns"]

    assert (columns(20, True), columns(60, True), columns(60, False)) == (2, 1, 2)


def test_no_axis_stands_under_an_empty_place_among_panels() -> None:
    five = Grid(values=np.ones((5, 2, 3)), axes=("kind", "layer", "head")).spec()
    assert five["resolve"] == {"axis": {"x": "independent"}}
    assert "resolve" not in Grid(values=np.ones((6, 2, 3)), axes=("kind", "layer", "head")).spec()


def test_shared_keys_are_tied_to_the_heads_that_use_them() -> None:
    nodes = ["embed", "L0.attn.k[0]", "L0.attn.z[0]", "L0.attn.z[1]", "logits"]
    graph = Graph(
        nodes=nodes,
        source=[0, 2, 3],
        target=[1, 4, 4],
        weight=[1.0, 2.0, 3.0],
        layer=[0, 1, 2, 2, 3],
        edge_columns={"into": ["k", "", ""]},
        about={"heads": (2,), "kv_heads": (1,)},
    )
    rows = graph.spec()["data"]["values"]
    assert sum(row["part"] == "tie" for row in rows) == 2
    assert {row["into"] for row in rows if row["part"] == "edge"} == {"k", ""}
    assert not any(row["part"] == "tie" for row in graph.replace(about={}).spec()["data"]["values"])


def test_a_graph_draws_its_strongest_edges_and_says_so() -> None:
    graph = Graph(nodes=["a", "b", "c"], source=[0, 1, 0], target=[1, 2, 2], weight=[0.1, -5.0, 2.0])
    spec = graph.spec(edges=1)
    assert {row["shown"] for row in spec["data"]["values"] if row["part"] == "edge"} == {"-5"}
    assert "the strongest 1 of 3 edges" in spec["title"]["subtitle"]
    assert {row["node"] for row in spec["data"]["values"] if row["part"] == "node"} == {"b", "c"}


def test_a_flow_over_many_positions_is_drawn_with_the_image_as_one_column_and_the_strongest_of_the_rest() -> None:
    values = np.zeros((4, 2, 200))
    values[0, 1, 5:105] = 0.5
    values[1, 0, 150] = 3.0
    values[2, 0, :] = np.nan
    roles = np.array(["text"] * 5 + ["image"] * 100 + ["text"] * 95, dtype=object)
    flow = Grid(values=values, axes=("flow", "layer", "position"), labels={"position": tuple(map(str, range(200)))})
    drawn = pictures.narrowed(flow, roles)
    assert drawn.values.shape == (4, 2, pictures.POSITIONS)
    at = drawn.along("position").index("100 image tokens")
    assert drawn.values[0, 1, at] == 50.0
    assert np.isnan(drawn.values[2, 0]).all()
    assert drawn.values[1, 0, drawn.along("position").index("150")] == 3.0
    assert np.nansum(drawn.values) == np.nansum(values)
