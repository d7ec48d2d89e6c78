from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types
import numpy as np
import pytest
import torch
from PIL import Image as PILImages

from cutaway.core import params
from cutaway.core.errors import CutawayError, ImageError, MethodError, SiteRangeError, SiteSyntaxError
from cutaway.core.forms.base import join_list, split_list
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Apply, Mean, Scale, Zero
from cutaway.core.metric import Metric
from cutaway.core.params import form_of, without_none
from cutaway.core.result import Result
from cutaway.core.site import Items, Site
from cutaway.results.grid import Grid
from tests.unit.cli.fakes import WORDS, StubModel

ODD = [
    "",
    " ",
    "a",
    " Paris",
    "Paris ",
    "#",
    "# 1",
    "#x",
    "-x",
    "--out",
    "a,b",
    '"a"',
    '"',
    "\\",
    "\\begin",
    "\n\t",
    "é漢",
]
ODD += ["[INST] hi", '["a"]', "[1, 2]", "@file", "\\@file", "*", "null", "true", "#1x", "l'été", "a\\,b", "{}", "\x00"]
READ_AS_IDS = ["#11", "#1 #2", " #1  #2 "]

MODEL = StubModel()


def two_rows(**extra: Any) -> Inputs:
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    names = (("a", "b", "c"), ("d", "e", "_"))
    roles = (("text",) * 3, ("text", "text", "pad"))
    return Inputs(ids=ids, mask=mask, tokens=names, roles=roles, extra=extra)


CASES = [
    *[(params.Prompt, text) for text in [*ODD, *READ_AS_IDS]],
    (params.Prompt, [12, 7, 99]),
    (params.Prompt, torch.tensor([3, 4])),
    (params.Prompt, torch.tensor([[3, 4]])),
    (params.Prompt, np.array([3])),
    *[(params.Prompts, text) for text in [*ODD, *READ_AS_IDS]],
    (params.Prompts, ODD),
    (params.Prompts, ["one"]),
    (params.Prompts, ['["a"]']),
    (params.Words, [[5, 6], [7]]),
    (params.Words, ["one", "two, three"]),
    *[(params.Words, text) for text in [*ODD, *READ_AS_IDS]],
    (params.Prompts, [5, 6]),
    (params.Prompts, [[5, 6], [7]]),
    (params.Prompts, torch.tensor([[5, 6], [7, 8]])),
    *[(params.Target, text) for text in [*ODD, *READ_AS_IDS]],
    (params.Target, 11),
    (params.Target, torch.tensor(11)),
    (list[params.Target], [*ODD[1:], 11]),
    (list[params.Target], ' a, " b", #3'),
    (params.Sites, "L*.resid_post, L3.attn.z[5]@-1, vision/L0-2.attn.pattern"),
    (params.Sites, [Site.parse("embed"), "L-1.mlp.act[0+2-4]@image"]),
    (params.MetricLike, 'logit_diff: " a,b", #22 @-1'),
    (params.Positions, "0-3+7"),
    (params.Positions, "image"),
    (params.Positions, -1),
    (params.Positions, [0, 1, -1]),
    (params.Layers, "*"),
    (params.Layers, "0-1+-1"),
    (params.Layers, range(3)),
    (params.Image, "a/b c.png"),
    (params.Image, Path("é.png")),
    (params.Count, 3),
    (params.Count, "3"),
    (params.Fraction, 0.1),
    (bool, True),
    (bool, "false"),
    (int, -12),
    (float, 0.1 + 0.2),
    (float, 1e-300),
    (float, float("-inf")),
    *[(str, text) for text in ODD],
    (Path, "out/x.json"),
    (Literal["a", "-b"], "-b"),
    (list[int], [1, -2]),
    (list[int], []),
    (list[float], np.array([0.5, 1e9])),
    (list[str], ODD),
    (Grid, "out/grid"),
]


@pytest.mark.parametrize(("annotation", "given"), CASES)
def test_parse_is_the_inverse_of_text(annotation: Any, given: Any) -> None:
    form = form_of(annotation)
    value = form.accept(given)
    text = form.text(value)
    assert isinstance(text, str)
    assert form.parse(text) == value
    assert form.text(form.parse(text)) == text


@pytest.mark.parametrize("text", ODD)
def test_a_text_is_taken_as_it_stands_unless_it_reads_as_ids(text: str) -> None:
    assert form_of(params.Prompt).value(form_of(params.Prompt).accept(text), MODEL) == text


@pytest.mark.parametrize(
    ("text", "value"), [("#12 #7", [12, 7]), ("\\#12 #7", "#12 #7"), ("\\\\#1", "\\#1"), ("#12 #", "#12 #")]
)
def test_ids_and_their_escape(text: str, value: Any) -> None:
    form = form_of(params.Prompt)
    assert form.value(form.accept(text), MODEL) == value


def test_prompts_of_equal_length_become_one_tensor() -> None:
    form = form_of(params.Prompts)
    assert torch.equal(form.value(form.accept('["#1 #2", "#3 #4"]'), MODEL), torch.tensor([[1, 2], [3, 4]]))
    assert form.value(form.accept([[1, 2], [3]]), MODEL) == [[1, 2], [3]]
    assert form.value(form.accept("one"), MODEL) == ["one"]


@pytest.mark.parametrize("given", [3.5, [], [1.5], [True], ["a", [1]], torch.tensor([1.5]), None, [[-1]]])
def test_prompts_refuse_what_is_neither_text_nor_ids(given: Any) -> None:
    with pytest.raises(ValueError, match=r"it (is|mixes)"):
        form_of(params.Prompts).accept(given)


def test_inputs_are_taken_and_written_as_their_ids() -> None:
    form, inputs = form_of(params.Prompts), two_rows()
    assert form.value(form.accept(inputs), MODEL) is inputs
    assert form.text(inputs) == '["#1 #2 #3", "#4 #5"]'
    assert form.content(inputs) == inputs.digest.encode()
    with pytest.raises(ValueError, match="2 rows and one prompt is wanted"):
        form_of(params.Prompt).accept(inputs)


@pytest.mark.parametrize(
    ("annotation", "given"),
    [
        (params.Prompts, two_rows(pixel_values=torch.zeros(1))),
        (params.Image, PILImages.new("RGB", (3, 2))),
        (params.MetricLike, Metric("kl").against(torch.zeros(1, 5))),
        (params.Interventions, Apply("embed", lambda x, where: x)),
        (params.Interventions, Mean("embed", torch.ones(2))),
        (Grid, Grid(values=[[1.0]], axes=("a", "b"))),
        (list[params.Image], ["a.png", PILImages.new("RGB", (3, 2))]),
    ],
)
def test_what_no_text_can_hold_says_so_when_it_is_read_back(annotation: Any, given: Any) -> None:
    form = form_of(annotation)
    text = form.text(form.accept(given))
    with pytest.raises((ValueError, CutawayError), match="made in memory and not saved"):
        form.accept(text)


@pytest.mark.parametrize("word", WORDS)
def test_a_target_is_the_id_of_its_token(word: str) -> None:
    form = form_of(params.Target)
    assert form.value(form.accept(word), MODEL) == WORDS.index(word)


def test_sites_metrics_and_interventions_become_values() -> None:
    sites = form_of(params.Sites)
    assert sites.value(sites.accept("embed, L1.mlp.out"), MODEL) == [Site.parse("embed"), Site.parse("L1.mlp.out")]
    metric = form_of(params.MetricLike)
    assert metric.value(metric.accept("logit_diff: cat, #22"), MODEL).ids == (0, 22)
    given = Metric("entropy")
    assert metric.value(metric.accept(given), MODEL) is given
    do = form_of(params.Interventions)
    zero, scale = do.accept([Zero("L3.attn.z[5]"), "scale L2.mlp.out 0.30000000000000004"])
    assert isinstance(zero, Zero)
    assert isinstance(scale, Scale)
    assert do.text((zero, scale)) == "zero L3.attn.z[5], scale L2.mlp.out 0.30000000000000004"
    assert do.text(do.parse(do.text((zero, scale)))) == do.text((zero, scale))


def test_layers_are_those_of_the_model() -> None:
    form = form_of(params.Layers)
    assert form.value(form.accept("*"), MODEL) == [0, 1, 2, 3]
    assert form.value(form.accept("0+-2--1"), MODEL) == [0, 2, 3]
    with pytest.raises(SiteRangeError, match="layer 4"):
        form.value(form.accept("4"), MODEL)
    assert form_of(params.Positions).value(Items.of(-1), MODEL) == Items.of(-1)


@pytest.mark.parametrize(
    ("annotation", "given", "found"),
    [
        (params.Count, 0, "greater than or equal to 1"),
        (params.Count, "x", "valid integer"),
        (params.Fraction, 1.5, "less than or equal to 1"),
        (float, "nan", "should be a number"),
        (int, 1.5, "integer"),
        (Literal["a", "b"], "c", "'a' or 'b'"),
        (str, 3, "string"),
        (list[int], "1,,2", "does not read as a list"),
        (list[int], '1, "2', "does not read as a list"),
        (params.Target, -1, "it is an int"),
        (params.Target, True, "it is a bool"),
        (params.Sites, "", "names no site"),
        (params.Sites, [3], "it is a list"),
        (params.Positions, "x", "not a number or a range"),
        (params.Layers, [1.5], "it is a list"),
        (Grid, 3, "it is an int"),
    ],
)
def test_wrong_values_are_refused_with_what_was_found(annotation: Any, given: Any, found: str) -> None:
    with pytest.raises((ValueError, SiteSyntaxError), match=found):
        form_of(annotation).accept(given)


def test_an_image_is_opened_and_known_by_its_content(tmp_path: Path) -> None:
    form, path = form_of(params.Image), tmp_path / "dot.png"
    PILImages.new("RGB", (3, 2), (255, 0, 0)).save(path)
    image = form.value(form.accept(path), MODEL)
    assert image.size == (3, 2)
    assert form.text(image) == str(path)
    before = form.content(form.accept(str(path)))
    PILImages.new("RGB", (3, 2), (0, 255, 0)).save(path)
    assert form.content(str(path)) != before
    with pytest.raises(ImageError, match="no such file"):
        form.value("none.png", MODEL)
    path.write_bytes(b"not an image")
    with pytest.raises(ImageError, match="cannot be read"):
        form.value(str(path), MODEL)


def test_a_result_is_opened_from_its_folder_and_must_be_of_the_kind(tmp_path: Path) -> None:
    grid = Grid(values=[[1.0]], axes=("a", "b"))
    grid.save(tmp_path / "grid")
    form = form_of(Grid)
    assert form.value(form.accept(tmp_path / "grid"), MODEL) == grid
    assert form.value(grid, MODEL) is grid
    other = next(kind for kind in Result.kinds.values() if kind is not Grid)
    with pytest.raises(ValueError, match=f"holds a grid, not a {other.__name__}"):
        form_of(other).value(str(tmp_path / "grid"), MODEL)


@pytest.mark.parametrize("annotation", [dict, dict[str, int], Any, object, Literal[1, 2], int | str, tuple[int, str]])
def test_an_annotation_without_a_text_form_is_refused(annotation: Any) -> None:
    with pytest.raises(MethodError, match="no text form is known"):
        form_of(annotation)


def test_bounds_are_said() -> None:
    assert form_of(params.Count).says == "a whole number (at least 1)"
    assert "above 0" in form_of(Annotated[float, annotated_types.Gt(0)]).says


def test_optional_types_are_taken_apart() -> None:
    assert without_none(int | None) == (int, True)
    assert without_none(params.Target | None) == (params.Target, True)
    assert without_none(int) == (int, False)


@pytest.mark.parametrize("items", [ODD, ["a"], [""], ["a", ""], [], ["a, b", "c"]])
def test_lists_read_back(items: list[str]) -> None:
    assert split_list(join_list(items)) == items


@pytest.mark.parametrize("few", ["1", "4", "-1", "two"])
def test_a_proof_takes_enough_draws_or_none(few: str) -> None:
    form = form_of(params.DrawCount)
    assert [form.parse(text) for text in ("0", "5", "12")] == [0, 5, 12]
    with pytest.raises(ValueError, match=r"at least 5, or 0|valid integer"):
        form.parse(few)
