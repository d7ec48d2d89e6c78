"""Sweeps over several pairs of prompts: means of the single calls, whose errors are over pairs, on circuits too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cutaway import catalog, specimens
from cutaway.core.errors import MismatchError, ParameterError
from cutaway.engine.estimate import estimates
from cutaway.engine.exchanges import Kept, exchanges
from cutaway.models.load import load
from cutaway.results import Grid
from tests.architectures import inputs, model
from tests.unit.models.vlm_folders import SIDE, save

CLEAN = [[70, 71, 72, 73, 74], [70, 80, 81, 82, 83], [5, 9, 72, 7, 74]]
CORRUPT = [[70, 90, 72, 93, 74], [70, 80, 61, 82, 63], [5, 4, 72, 7, 74]]
UNEVEN = (
    [[70, 71, 72, 73, 74], [80, 81, 82, 83], [5, 9, 6, 7, 8, 11]],
    [[70, 90, 72, 93, 74], [80, 61, 82, 63], [5, 4, 6, 7, 8, 11]],
)
DIFF = "logit_diff: #11, #22"
SWEEPS: list[tuple[str, dict[str, Any]]] = [
    ("patch", {"kind": "resid_post"}),
    ("patch", {"kind": "attn.z", "by": "head", "direction": "corrupt->clean"}),
    ("patch", {"kind": "mlp.act", "by": "neurons", "positions": "1-3"}),
    ("attribution_patching", {"kind": "resid_pre", "draws": 0, "verify": 0}),
    ("attribution_patching", {"kind": "attn.z", "by": "head", "steps": 3, "direction": "corrupt->clean"}),
    ("path_patching", {"receivers": "L2.attn.v, L2.mlp.in", "draws": 0}),
    ("path_patching", {"receivers": "L2.attn.q@-1, final_norm", "senders": "all", "each": True, "draws": 0}),
    ("path_patching", {"receivers": "L2.attn.k", "between": "mlps", "direction": "corrupt->clean"}),
]


def run(method: str, of: Any, clean: Any, corrupt: Any, **params: Any) -> Grid:
    found = catalog.run(method, of, clean=clean, corrupt=corrupt, **params)
    assert isinstance(found, Grid)
    assert found.check is not None
    assert found.check.holds, str(found.check)
    return found


def singles(method: str, of: Any, clean: Sequence[Any], corrupt: Sequence[Any], **params: Any) -> list[Grid]:
    return [run(method, of, a, b, **params) for a, b in zip(clean, corrupt, strict=True)]


def differences(of: Any, clean: Sequence[Any], corrupt: Sequence[Any], sign: int = 1) -> np.ndarray:
    """What the clean run has more of the logit difference, for each pair."""
    ends = [[of([ids])[0, -1, [11, 22]].detach() for ids in pair] for pair in zip(clean, corrupt, strict=True)]
    return np.array([sign * float((a[0] - a[1]) - (b[0] - b[1])) for a, b in ends])


@pytest.mark.parametrize("name", ["grouped-query", "no-interface"])
@pytest.mark.parametrize(("method", "params"), SWEEPS)
def test_it_is_the_mean_of_the_single_calls_with_its_error(method: str, params: dict[str, Any], name: str) -> None:
    of = model(name)
    given = {"metric": DIFF, "normalise": False, **params}
    several, each = run(method, of, CLEAN, CORRUPT, **given), singles(method, of, CLEAN, CORRUPT, **given)
    values = np.stack([grid.values for grid in each]).astype(float)
    np.testing.assert_allclose(several.values, values.mean(0), atol=1e-5)
    np.testing.assert_allclose(several.standard_error, values.std(0, ddof=1) / 3**0.5, atol=1e-5)
    assert np.nanmax(several.standard_error) > 1e-3
    assert "mean over 3 pairs" in several.title
    assert "standard_error" in several.table().columns
    assert all(grid.standard_error is None for grid in each)


@pytest.mark.parametrize(("method", "params"), SWEEPS)
def test_normalised_it_is_the_mean_change_over_the_mean_difference(method: str, params: dict[str, Any]) -> None:
    of = model("grouped-query")
    sign = -1 if params.get("direction") == "corrupt->clean" else 1
    of_all = differences(of, CLEAN, CORRUPT, sign)
    several = run(method, of, CLEAN, CORRUPT, metric=DIFF, **params)
    each = singles(method, of, CLEAN, CORRUPT, metric=DIFF, **params)
    changes = np.stack([grid.values * d for grid, d in zip(each, of_all, strict=True)])
    np.testing.assert_allclose(several.values, changes.mean(0) / of_all.mean(), atol=2e-4)
    assert several.unit == each[0].unit


@pytest.mark.parametrize(("method", "params"), SWEEPS)
def test_each_pair_may_have_its_own_answer(method: str, params: dict[str, Any]) -> None:
    of, answers, rivals = model("grouped-query"), [11, 12, 13], [22, 23, 24]
    given = {"normalise": False, **params}
    several = run(method, of, CLEAN, CORRUPT, answers=answers, rivals=rivals, **given)
    values = [
        run(method, of, a, b, metric=f"logit_diff: #{x}, #{y}", **given).values
        for a, b, x, y in zip(CLEAN, CORRUPT, answers, rivals, strict=True)
    ]
    np.testing.assert_allclose(several.values, np.mean(values, axis=0), atol=1e-5)
    assert any("logit of the answer less its rival's" in note for note in several.notes)
    alone = run(method, of, CLEAN[:2], CORRUPT[:2], answers="#11, #12", **given)
    values = [
        run(method, of, a, b, metric=f"logprob: #{x}", **given).values
        for a, b, x in zip(CLEAN[:2], CORRUPT[:2], answers[:2], strict=True)
    ]
    np.testing.assert_allclose(alone.values, np.mean(values, axis=0), atol=1e-5)
    assert (alone.unit, alone.measure.split("of ")[-1]) == ("nats", "log p(answer)")


def test_pairs_of_unequal_lengths_are_averaged_where_cells_do_not_count_positions() -> None:
    of = model("grouped-query")
    for params in (
        {"kind": "attn.z", "by": "head"},
        {"kind": "mlp.act", "by": "neurons", "positions": "-1"},
        {"kind": "resid_pre", "positions": "-3--1"},
        {"kind": "resid_pre", "positions": "0+-2+-1"},
    ):
        given = {"metric": DIFF, "normalise": False, **params}
        several, each = run("patch", of, *UNEVEN, **given), singles("patch", of, *UNEVEN, **given)
        np.testing.assert_allclose(several.values, np.mean([grid.values for grid in each], axis=0), atol=1e-5)
    assert several.labels["position"] == (0, -2, -1)
    with pytest.raises(MismatchError, match=r"prompt 0 has 5 of them and prompt 1 has 4; name as many in all"):
        run("patch", of, *UNEVEN, metric=DIFF)


def test_positions_are_labelled_with_tokens_that_all_pairs_share() -> None:
    found = run("patch", model("grouped-query"), CLEAN, CORRUPT, metric=DIFF)
    assert found.labels["position"] == (0, 1, 2, 3, 4)
    alike = run("patch", model("grouped-query"), CLEAN[::2], CORRUPT[::2], metric=DIFF)
    assert alike.labels["position"] == (0, 1, "#72", 3, "#74")


def test_prompts_may_come_as_text_tensors_or_padded_inputs() -> None:
    of = model("grouped-query")
    given = {"metric": DIFF, "kind": "attn.z", "by": "head"}
    expected = run("patch", of, *UNEVEN, **given)
    texts = [json.dumps([" ".join(f"#{i}" for i in row) for row in rows]) for rows in UNEVEN]
    left, right = ([of.inputs(rows, padding_side=side) for rows in UNEVEN] for side in ("left", "right"))
    for form in (texts, left, right):
        found = run("patch", of, *form, **given)
        assert found.same_as(expected, rtol=0, atol=1e-6).lines == ()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("method", "params"), SWEEPS)
def test_padding_of_one_prompt_of_a_pair_changes_nothing(method: str, params: dict[str, Any], side: str) -> None:
    of = model("grouped-query")
    padded = of.inputs([CLEAN[0], [5] * 8], padding_side=side).take([0])
    plain = run(method, of, CLEAN[0], CORRUPT[0], metric=DIFF, **params)
    assert run(method, of, padded, CORRUPT[0], metric=DIFF, **params).same_as(plain, rtol=0, atol=1e-6).lines == ()
    with pytest.raises(MismatchError, match="they are the same in row 0"):
        run(method, of, padded, of.inputs(CLEAN[0]), metric=DIFF, **params)


@pytest.mark.parametrize("name", ["llava", "qwen-vl"])
def test_every_pair_may_bring_its_own_images(name: str) -> None:
    clean, corrupt = [inputs(name), inputs(name, seed=5)], [inputs(name, seed=3), inputs(name, seed=4)]
    given = {"metric": DIFF, "kind": "attn.z", "by": "head", "normalise": False}
    found, each = (
        run("patch", model(name), clean, corrupt, **given),
        singles("patch", model(name), clean, corrupt, **given),
    )
    np.testing.assert_allclose(found.values, np.mean([grid.values for grid in each], axis=0), atol=1e-5)


def test_one_image_goes_with_every_pair(tmp_path: Path) -> None:
    save("llava", tmp_path)
    of, path = load(tmp_path), tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    given = {"metric": DIFF, "kind": "attn.z", "by": "head", "normalise": False, "clean_image": path}
    words = (["what is here", "the red blue"], ["where is here", "the square blue"])
    found, each = run("patch", of, *words, **given), singles("patch", of, *words, **given)
    np.testing.assert_allclose(found.values, np.mean([grid.values for grid in each], axis=0), atol=1e-5)


def ioi(n: int) -> dict[str, Any]:
    """Pairs whose second name is said twice, or the first one; every pair has its own answer."""
    form = "When {} and {} went home , {} gave a drink to"
    names = list(permutations(["Ada", "Bea", "Cal", "Dot", "Eli", "Fay"], 2))[:n]
    return {
        "clean": json.dumps([form.format(a, b, b) for a, b in names]),
        "corrupt": json.dumps([form.format(a, b, a) for a, b in names]),
        "answers": [f" {a}" for a, _ in names],
        "rivals": [f" {b}" for _, b in names],
    }


def test_over_many_pairs_the_heads_of_the_circuit_stand_out() -> None:
    of, pairs, heads = load("circuit-ioi"), ioi(24), specimens.card("circuit-ioi").truths["heads"]
    found = run("patch", of, kind="attn.z", by="head", **pairs)
    assert [f"L{layer}.attn.z[{head}]" for layer, head in np.argwhere(found.values > 0.5)] == heads
    assert found.standard_error is not None
    assert found.standard_error.max() < 0.05
    few = ioi(3)
    with_answers = run("patch", of, kind="attn.z", by="head", **few)
    own = run("patch", of, few["clean"], few["corrupt"], kind="attn.z", by="head")  # each pair's own two answers
    np.testing.assert_allclose(own.values, with_answers.values, atol=1e-5)
    same = json.dumps([*json.loads(few["clean"])[:2], "When Dot and Ada went home , Ada gave a drink to"])
    with pytest.raises(ParameterError, match="both prompts of pair 2 are answered with 'Dot'"):
        run("patch", of, same, few["corrupt"])


def test_over_many_pairs_paths_lead_from_the_head_that_hears_to_the_one_that_looks() -> None:
    found = run("path_patching", load("circuit-ioi"), receivers="L2.attn.q[2]@-1", draws=8, **ioi(20))
    strong = [f"L{layer}.attn.z[{head}]" for layer, head in np.argwhere(found.values > 0.1)]
    assert strong == ["L1.attn.z[0]"]
    assert found.values[1, 0] == pytest.approx(1, abs=0.01)
    assert found.proof is not None
    assert found.proof.holds, str(found.proof)
    assert found.proof.effect[0] == pytest.approx(80.6, abs=0.5)  # the mean difference of the runs, in logits


@pytest.mark.parametrize(("name", "kind"), [("grouped-query", "mlp.act"), ("experts", "expert.act")])
@pytest.mark.parametrize("steps", [1, 4])
def test_pairs_of_one_length_are_estimated_together_within_the_budget(steps: int, name: str, kind: str) -> None:
    of, passes = model(name), []
    clean, corrupt = [*UNEVEN[0], *CLEAN], [*UNEVEN[1], *CORRUPT]
    pairs = exchanges(of, clean, corrupt, None, [7] * 6, [9, 8, 6, 5, 4, 3], "clean->corrupt")
    sites = of.expand(f"L*.attn.z, L*.{kind}")
    together, alone = {}, {}
    hook = of.hf.register_forward_pre_hook(lambda *_: passes.append(1))
    together.update(estimates(of, pairs, sites, steps))
    n = len(passes)
    alone.update(estimates(of, pairs, sites, steps, budget=1))
    hook.remove()
    assert together.keys() == alone.keys() == set(range(6))
    assert n == 3 * (2 if steps == 1 else 3)  # three lengths; the runs that give and receive, and the points at once
    assert len(passes) - n == 6 * (2 if steps == 1 else 2 + steps)
    for number, one in alone.items():
        assert together[number].base == pytest.approx(one.base, abs=1e-5)
        for site in sites:
            torch.testing.assert_close(together[number].terms[site], one.terms[site], atol=1e-5, rtol=1e-4)
        for site, weights in one.weights.items():
            torch.testing.assert_close(together[number].weights[site], weights, atol=1e-5, rtol=1e-4)


def test_over_many_pairs_what_is_promised_is_patched_for_real() -> None:
    heads = specimens.card("circuit-ioi").truths["heads"]
    found = run("attribution_patching", load("circuit-ioi"), kind="attn.z", by="head", steps=5, draws=8, **ioi(20))
    order = np.argsort(-np.abs(found.values), axis=None)[:3]
    top = [np.unravel_index(n, found.values.shape) for n in order]
    assert sorted(f"L{layer}.attn.z[{head}]" for layer, head in top) == heads
    assert found.proof is not None
    assert found.proof.holds, str(found.proof)
    assert found.proof.effect[0] == pytest.approx(80.6, abs=0.5)  # any one of the three carries the whole difference
    assert any("patched for real (replay): rank correlation" in note for note in found.notes)


def test_what_does_not_fit_the_budget_is_made_again() -> None:
    of, heads = model("grouped-query"), {"kind": "attn.z", "by": "head"}
    sweeps = [("patch", heads), ("attribution_patching", heads), ("path_patching", {"receivers": "L2.attn.v"})]
    for method, params in sweeps:
        wide, narrow = (run(method, of, *UNEVEN, metric=DIFF, budget=b, **params) for b in (2**30, 1))
        assert narrow.same_as(wide, rtol=1e-4, atol=1e-5).lines == ()
        if method != "patch":
            assert wide.proof is not None
            assert narrow.proof is not None
            np.testing.assert_allclose(narrow.proof.random, wide.proof.random, atol=1e-5)
    experts = {"metric": DIFF, "kind": "expert.act", "by": "expert", "steps": 3}
    wide, narrow = (run("attribution_patching", model("experts"), *UNEVEN, budget=b, **experts) for b in (2**30, 1))
    assert narrow.same_as(wide, rtol=1e-4, atol=1e-5).lines == ()  # its check holds: so do the weights of points
    held: list[int] = []
    kept = Kept(lambda i: held.append(i) or i, lambda i: 10, 25)
    assert [kept[i] for i in (0, 1, 2, 0, 1, 2)] == [0, 1, 2, 0, 1, 2]
    assert held == [0, 1, 2, 2]


def test_paths_of_unequal_lengths_are_averaged() -> None:
    of, given = model("grouped-query"), {"metric": DIFF, "normalise": False, "receivers": "L2.attn.q@-1, L2.mlp.in"}
    found, each = run("path_patching", of, *UNEVEN, **given), singles("path_patching", of, *UNEVEN, **given)
    np.testing.assert_allclose(found.values, np.mean([grid.values for grid in each], axis=0), atol=1e-5)
    assert found.proof is not None
    with pytest.raises(LookupError, match="position 5 is not there"):
        run("path_patching", of, *UNEVEN, metric=DIFF, receivers="L2.attn.q@5")


@pytest.mark.parametrize(
    ("params", "error", "sentence"),
    [
        ({"corrupt": CORRUPT[:2]}, MismatchError, "3 clean and 2 corrupt prompts; give one corrupt prompt for each"),
        ({"corrupt": [*CORRUPT[:2], [5, 4, 72, 7]]}, MismatchError, r"row 2 has 5 and 4 tokens, .* \['#9', '#72'"),
        ({"answers": [11, 12]}, MismatchError, "answers: 2 tokens for 3 prompts"),
        ({"answers": [11, 12, 13], "rivals": [1]}, MismatchError, "rivals: 1 tokens for 3 prompts"),
        ({"answers": [11, 12, 13], "metric": DIFF}, ParameterError, "they are given together"),
        ({"rivals": [11, 12, 13]}, ParameterError, "neither is given"),
        ({"corrupt": CLEAN, "metric": DIFF}, MismatchError, "they are the same in row 0: '#70#71#72#73#74'"),
        ({"corrupt": [*CORRUPT[:2], CLEAN[2]], "metric": DIFF}, MismatchError, "they are the same in row 2: '#5#9#72"),
        ({"metric": f"{DIFF} @0"}, ParameterError, "both runs give .* on average over 3 pairs"),  # before they differ
        ({"clean": [*CLEAN[:2], "f m d"], "metric": DIFF}, ParameterError, "it mixes texts and token ids"),
    ],
)
@pytest.mark.parametrize("method", ["patch", "path_patching", "attribution_patching"])
def test_what_cannot_be_averaged_says_why(
    method: str, params: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    more = {"receivers": "L1.attn.q"} if method == "path_patching" else {}
    with pytest.raises(error, match=sentence):
        run(method, model("parallel"), **{"clean": CLEAN, "corrupt": CORRUPT, **more, **params})
