"""Edge scores on circuits whose edges are known, and on a linear model, where first order is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

import cutaway
from cutaway import catalog, specimens
from cutaway.core.errors import InputError, MismatchError, ParameterError, TokenError, UnsupportedError
from cutaway.models.handle import Model
from cutaway.ops.circuit_runs import CircuitRuns
from cutaway.ops.edge_scores import edge_scores, path_points
from cutaway.ops.fronts import read_fronts
from cutaway.ops.pairs import Pairs
from cutaway.ops.selection import mask
from cutaway.ops.wiring import Wiring
from cutaway.results import Graph
from tests.architectures import fresh, model
from tests.unit.models.vlm_folders import SIDE, save

CLEAN, CORRUPT = [70, 71, 72, 73, 74, 75], [70, 90, 72, 93, 74, 75]
GIVEN = {"clean": CLEAN, "corrupt": CORRUPT, "metric": "logit_diff: #11, #22"}


def edges(of: Model, **params: Any) -> Graph:
    found = catalog.run("edges", of, **{**GIVEN, **params})
    assert isinstance(found, Graph)
    assert found.check is not None
    assert found.check.holds
    return found


@pytest.mark.parametrize(("name", "every"), [("circuit-induction", 1), ("circuit-ioi", 4)])
def test_the_edges_of_a_wired_circuit_are_the_strongest(name: str, every: int) -> None:
    card = specimens.card(name)
    examples = card.examples[::every]
    found = edges(
        cutaway.load(name),
        clean=[each["prompt"] for each in examples],
        corrupt=None,
        metric=None,
        answers=[each["answer"] for each in examples],
        norms="frozen",
        steps=30,
        verify=0,
    )
    true = {tuple(edge) for edge in card.truths["edges"]}
    ranked = found.highlights()
    top, rest = ranked.head(len(true)), ranked.iloc[len(true) :]
    assert set(zip(top.source, top.target, top.into, strict=True)) == true
    assert rest.weight.abs().max() < 1e-3 * top.weight.abs().min()
    assert found.proof is not None
    assert found.proof.holds


def linear() -> Model:
    """GPT-2's shape without norms, with attention that looks everywhere alike and neurons that give what they get."""
    of = fresh("dense")
    for block in of.hf.transformer.h:
        block.ln_1, block.ln_2, block.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
        width = block.attn.c_attn.weight.shape[0]
        block.attn.c_attn.weight.data[:, : 2 * width] = 0
    of.hf.transformer.ln_f = nn.Identity()
    return Model(of.hf, name="linear")


def test_where_the_model_is_linear_scores_are_exact_effects() -> None:
    of = linear()
    found = edges(of, steps=1, verify=0)
    pairs = Pairs.of(of.inputs(CLEAN), of.inputs(CORRUPT), of.metric(GIVEN["metric"]))
    wiring = Wiring.of_model(of, pairs.clean)
    runs = CircuitRuns(of, pairs, wiring, read_fronts(of, pairs.clean, wiring))
    whole = torch.as_tensor(wiring.real)
    exact = runs(torch.stack([whole & ~mask(wiring, np.array([e])) for e in range(len(wiring))])) - runs.clean
    size = float(np.abs(found.weight).max())
    assert np.abs(found.weight - exact.mean(1).numpy()).max() < 1e-5 * size
    assert (found.weight[np.isin(found.edge_columns["into"], ["q", "k"])] == 0).all()
    assert np.count_nonzero(found.weight) > len(wiring) / 3


def test_more_steps_come_nearer_to_the_whole_change() -> None:
    def gap(steps: int) -> float:
        found = edges(model("grouped-query"), steps=steps, verify=0)
        out_of_embedding = found.weight[found.nodes[found.source] == "embed"].sum()
        values = [float(word.split(" in ")[0].split()[-1]) for word in found.notes[0].split(",")[1:3]]
        return abs(out_of_embedding - (values[1] - values[0]))

    assert gap(64) < gap(1) / 10


def test_scores_are_the_mean_over_prompts_however_they_are_padded() -> None:
    of = model("grouped-query")
    short, other = [60, 61, 62], [60, 66, 62]
    both = edges(of, clean=[CLEAN, short], corrupt=[CORRUPT, other], verify=0).weight
    one, two = (edges(of, clean=a, corrupt=b, verify=0).weight for a, b in ((CLEAN, CORRUPT), (short, other)))
    np.testing.assert_allclose(both, (one + two) / 2, atol=1e-5)


def test_the_strongest_edges_are_recomputed_by_intervening() -> None:
    found = edges(model("dense"), verify=4)
    exact = found.edge_columns["exact"]
    assert np.count_nonzero(~np.isnan(exact)) == 4
    assert set(np.flatnonzero(~np.isnan(exact))) == set(np.argsort(-np.abs(found.weight))[:4])
    assert any("recomputed exactly" in note for note in found.notes)


def test_a_poor_estimate_is_told() -> None:
    town = {
        "clean": "Lena Sharp lives in", "corrupt": "Cora Finch lives in", "metric": 'logit_diff: " Alder", " Easton"'
    }  # fmt: skip
    wired = {
        "clean": "When Ada and Bea went home , Bea gave a drink to",
        "corrupt": "When Cal and Dot went home , Dot gave a drink to",  # every match stays a match: no gradient sees it
        "metric": 'logit_diff: " Ada", " Bea"',
        "norms": "frozen",
    }
    good, bad = edges(cutaway.load("town"), **town), edges(cutaway.load("circuit-ioi"), **wired)
    assert not any("poor" in note for note in good.notes)
    assert any("poor, so go by their column 'exact'" in note for note in bad.notes)
    exact, weight = bad.edge_columns["exact"], bad.weight
    assert np.nanmax(np.abs(exact)[np.abs(weight) < 1]) > 30
    ranked = edges(
        cutaway.load("circuit-ioi"),
        **{**wired, "corrupt": "When Ada and Bea went home , Ada gave a drink to"},
        steps=30,
    )  # in order, and far off
    assert any("missing 91% of the largest effect is poor" in note for note in ranked.notes)


def test_frozen_norms_leave_out_how_a_sender_moves_the_scale() -> None:
    of = linear()
    np.testing.assert_allclose(edges(of, norms="frozen").weight, edges(of).weight, rtol=1e-6)  # there is no scale
    moving, frozen = (edges(model("dense"), norms=norms, verify=0).weight for norms in ("moving", "frozen"))
    assert np.abs(moving - frozen).max() > 1e-4


def test_keys_and_values_of_a_group_are_one_receiver() -> None:
    found = edges(model("grouped-query"), verify=0)
    into = {
        str(found.nodes[t]) for t, side in zip(found.target, found.edge_columns["into"], strict=True) if side == "k"
    }
    assert into == {f"L{i}.attn.k[{g}]" for i in range(3) for g in range(2)}
    assert len(found.weight) == 190


def test_a_text_with_an_image_is_scored_and_run(tmp_path: Path) -> None:
    save("gemma3", tmp_path)
    seeing = cutaway.load(str(tmp_path))
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (SIDE, SIDE), colour).save(tmp_path / f"{name}.png")
    images = {"clean_image": str(tmp_path / "red.png"), "corrupt_image": str(tmp_path / "blue.png")}
    pair = {"clean": "what is here", "corrupt": "what is here", **images, "metric": "logit_diff: red, blue"}
    found = edges(seeing, **pair, steps=2, verify=2)
    assert float(np.abs(found.weight).max()) > 1e-3
    curves = catalog.run("faithfulness", seeing, **pair, graph=found, fractions=[0.5], minimality=1)
    assert curves.check is not None
    assert curves.check.holds
    with pytest.raises(InputError, match="got 2 texts; give one text per call"):
        edges(seeing, **{**pair, "clean": ["what", "is"], "corrupt": ["what", "is"]})


def test_what_cannot_be_scored_is_refused_in_one_sentence() -> None:
    of = model("dense")
    with pytest.raises(MismatchError, match="row 0 has 6 and 5 tokens, first different at position 1"):
        edges(of, corrupt=[70, 90, 72, 93, 74])
    with pytest.raises(MismatchError, match="2 clean and 1 corrupt prompts"):
        edges(of, clean=[CLEAN, CLEAN])
    with pytest.raises(TokenError, match="#100000"):
        edges(of, metric="logit: #100000")
    with pytest.raises(ParameterError, match="they are given together"):
        edges(of, answers=["#11"])
    with pytest.raises(ParameterError, match="neither is given"):
        edges(of, metric=None)
    with pytest.raises(MismatchError, match="2 tokens for 1 prompts"):
        edges(of, metric=None, answers=["#11", "#22"])
    with pytest.raises(UnsupportedError, match="a mean has no scale of its own"):
        edges(model("post-norm"), corrupt=None)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation gives, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return found


@pytest.mark.parametrize("corrupt", [True, False])
def test_no_tensor_is_as_large_as_edges_times_rows_times_positions(corrupt: bool) -> None:
    rows, length, width = 3, 5, 8
    config = GPT2Config(n_embd=width, n_head=4, n_layer=4, vocab_size=40, bos_token_id=0, eos_token_id=0)
    narrow = Model(GPT2LMHeadModel(config).eval(), name="narrow")
    ids = torch.arange(2 * rows * length).view(2, rows, length) % 40
    clean, other = (narrow.inputs(each) for each in ids)
    pairs = Pairs.of(clean, other if corrupt else None, narrow.metric("logit_diff: #11, #22"))
    wiring = Wiring.of_model(narrow, clean)
    fronts = read_fronts(narrow, clean, wiring)
    with _Largest() as whole:
        edge_scores(narrow, pairs, wiring, fronts, path_points(2))
    senders = len(wiring.senders) * length * width  # of one row
    assert whole.numel >= rows * senders  # the changes of all senders, so nothing goes unseen
    assert whole.numel < len(wiring) * rows * length / 2
    with _Largest() as by_row:
        edge_scores(narrow, pairs, wiring, fronts, path_points(2), budget=4 * senders)
    assert by_row.numel < whole.numel
    assert by_row.numel == max(senders, wiring.real.size)
