"""Attribution patching against gradients taken by hand, against exact patching, and on circuits that are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cutaway import catalog, specimens
from cutaway.core.errors import MismatchError, ParameterError, TokenError, WeightsError
from cutaway.models.load import load
from cutaway.results import Grid
from tests.architectures import fresh, inputs, model

CLEAN, CORRUPT = [70, 71, 72, 73, 74, 75], [70, 90, 72, 93, 74, 75]
IOI = {
    "clean": "When Ada and Bea went home , Bea gave a drink to",
    "corrupt": "When Ada and Bea went home , Ada gave a drink to",
}
PATHS = {"attn.z": "model.layers.{}.self_attn.o_proj", "mlp.act": "model.layers.{}.mlp.down_proj"}


def estimated(of: Any, **params: Any) -> Grid:
    given = {"clean": CLEAN, "corrupt": CORRUPT, "metric": "logit_diff: #11, #22", "normalise": False, **params}
    found = catalog.run("attribution_patching", of, **given)
    assert isinstance(found, Grid)
    assert found.check is not None
    assert found.check.holds, str(found.check)
    return found


@pytest.mark.parametrize("method", ["attribution_patching", "patch", "edges", "faithfulness"])
def test_two_runs_that_are_the_same_are_refused(method: str) -> None:
    given = {"clean": CLEAN, "corrupt": CLEAN, "metric": "logit_diff: #11, #22"}
    with pytest.raises(
        MismatchError, match="clean and corrupt prompts: they are the same in row 0: '#70#71#72#73#74#75'"
    ):
        catalog.run(method, model("dense"), **given)


@pytest.mark.parametrize("method", ["attribution_patching", "patch"])
def test_weights_that_are_no_numbers_are_told_before_their_answers(method: str) -> None:
    broken = fresh("dense")
    with torch.no_grad():
        next(p for n, p in broken.hf.named_parameters() if "mlp" in n).view(-1)[3] = float("nan")
    with pytest.raises(WeightsError, match="holds NaN or infinite values"):
        catalog.run(method, broken, clean=CLEAN, corrupt=CORRUPT)


def by_hand(kind: str, layer: int) -> Tensor:
    """[pos, unit] change times gradient at the input of an output matrix, with plain hooks and whole logits."""
    hf = fresh("grouped-query").hf
    seen: list[Tensor] = []

    def keep(module: Any, args: Any) -> Any:
        seen.append(args[0].detach().requires_grad_())
        return (seen[-1], *args[1:])

    handle = hf.get_submodule(PATHS[kind].format(layer)).register_forward_pre_hook(keep)
    for ids in (CLEAN, CORRUPT):
        logits = hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    handle.remove()
    (logits[11] - logits[22]).backward()
    assert seen[1].grad is not None
    return ((seen[0] - seen[1]) * seen[1].grad)[0].detach()


def test_estimates_are_change_times_gradient() -> None:
    of = model("grouped-query")
    heads = estimated(of, kind="attn.z", by="head")
    some = estimated(of, kind="attn.z", by="head", positions="1-3")
    places = estimated(of, kind="attn.z")
    neurons = estimated(of, kind="mlp.act", by="neurons", blocks=96)
    blocks = estimated(of, kind="mlp.act", by="neurons", blocks=5, layers="1")
    for layer in range(3):
        z, acts = by_hand("attn.z", layer).unflatten(1, (4, -1)).sum(-1), by_hand("mlp.act", layer)
        np.testing.assert_allclose(heads.values[layer], z.sum(0), atol=1e-4)
        np.testing.assert_allclose(some.values[layer], z[1:4].sum(0), atol=1e-4)
        np.testing.assert_allclose(places.values[layer], z.sum(1), atol=1e-4)
        np.testing.assert_allclose(neurons.values[layer], acts.sum(0), atol=1e-4)
    acts = by_hand("mlp.act", 1).sum(0)
    for i, label in enumerate(blocks.labels["neurons"]):
        low, high = map(int, str(label).split("-"))
        assert blocks.values[0, i] == pytest.approx(float(acts[low : high + 1].sum()), abs=1e-4)


@pytest.mark.parametrize("name", ["dense", "parallel", "sliding-softcap", "no-interface"])
def test_integrated_over_many_steps_the_first_states_carry_the_whole_difference(name: str) -> None:
    of = model(name)
    low, high = (float(x[11] - x[22]) for x in (of([ids])[0, -1] for ids in (CORRUPT, CLEAN)))
    found = estimated(of, steps=200, layers="0", draws=0, verify=0)
    assert float(found.values.sum()) == pytest.approx(high - low, abs=1e-3 * max(1.0, abs(high - low)))


@pytest.mark.parametrize("kind", ["attn.q", "attn.k", "attn.v"])
def test_queries_keys_and_values_are_told_apart(kind: str) -> None:
    """For prompts that hardly differ in the layer, the estimate is what patching measures."""
    of = fresh("grouped-query")
    with torch.no_grad():
        rows = of.hf.get_input_embeddings().weight
        rows[90], rows[93] = rows[71] + 1e-3 * rows[90], rows[73] + 1e-3 * rows[93]
    given = {"clean": CLEAN, "corrupt": CORRUPT, "metric": "logit_diff: #11, #22", "normalise": False}
    exact = catalog.run("patch", of, kind=kind, by="head", **given)
    base = exact.center
    found = estimated(of, kind=kind, by="head", draws=0)
    size = float(np.abs(exact.values - base).max())
    assert size > 1e-4
    np.testing.assert_allclose(found.values, exact.values - base, atol=0.03 * size)


@pytest.mark.parametrize("direction", ["clean->corrupt", "corrupt->clean"])
def test_the_circuit_carries_the_largest_estimates_and_the_proof_holds(direction: str) -> None:
    of, card = load("circuit-induction"), specimens.card("circuit-induction")
    prompts = {"clean": "f m d k b i k", "corrupt": "f m k d b i k"}
    found = catalog.run(
        "attribution_patching", of, kind="attn.z", by="head", steps=10, direction=direction, draws=8, **prompts
    )
    assert found.check.holds
    heads = [f"L{layer}.attn.z[{head}]" for layer, head in np.argwhere(np.abs(found.values) > 0.05)]
    assert heads == card.truths["heads"]
    assert found.proof is not None
    assert found.proof.holds, str(found.proof)
    assert "logit_diff" in found.notes[0]


def test_strong_cells_are_verified_and_poor_estimates_are_called_so() -> None:
    of, given = load("circuit-ioi"), {"by": "head", "verify": 4, "draws": 0, **IOI}
    found = catalog.run("attribution_patching", of, kind="attn.z", **given)
    exact = catalog.run("patch", of, kind="attn.z", by="head", metric='logit_diff: " Ada", " Bea"', **IOI)
    error = abs(found.values - exact.values).max() / abs(exact.values).max()
    said = " ".join(found.notes)
    assert "the 4 strongest patched for real (replay)" in said
    assert f"that is {error:.0%} of the largest effect: use 'patch' here" in said
    assert "probability 1.0000" in said


@pytest.mark.parametrize("verify", [2, 48])  # the ranks of few cells, or of cells that do nothing, say little
def test_estimates_that_are_near_are_not_called_poor(verify: int) -> None:
    given = {"kind": "mlp.act", "by": "neurons", "verify": verify}
    found = estimated(model("grouped-query"), **given)
    said = next(note for note in found.notes if f"the {verify} strongest patched for real" in note)
    error = float(said.split("largest error ")[1].split()[0])
    assert 0.1 < error / abs(found.values).max() < 0.5
    assert "'patch'" not in " ".join(found.notes)


def test_gradients_that_vanish_are_told_from_effects_that_are_none() -> None:
    of = load("circuit-ioi")
    found = catalog.run("attribution_patching", of, kind="attn.q", by="head", verify=12, draws=0, **IOI)
    exact = catalog.run("patch", of, kind="attn.q", by="head", metric='logit_diff: " Ada", " Bea"', **IOI)
    assert exact.values[2, 2] == pytest.approx(1, abs=1e-3)  # the attention is saturated: its gradient is nothing
    assert abs(found.values).max() < 1e-3
    said = " ".join(found.notes)
    assert "that is 100% of the largest effect: use 'patch' here" in said
    assert "and the runs differ by 80.6: gradients may have vanished, which only 'patch' can tell" in said


def test_saturation_is_not_said_where_nothing_saturates() -> None:
    assert "saturate" not in " ".join(estimated(model("grouped-query")).notes)


def test_flags_of_the_weights_stay() -> None:
    of = fresh("grouped-query")
    some = list(of.hf.parameters())
    some[1].requires_grad_(False)
    flags = [p.requires_grad for p in some]
    estimated(of)
    with pytest.raises(ParameterError, match="has no gradient"):
        estimated(of, metric="rank: #11")
    assert [p.requires_grad for p in some] == flags
    assert all(p.grad is None for p in some)


@pytest.mark.parametrize(
    ("params", "error", "sentence"),
    [
        ({"corrupt": [70, 90, 72]}, MismatchError, r"row 0 has 6 and 3 tokens, first different at position 1: \['#71'"),
        ({"metric": "logit_diff: #11, #22 @0", "normalise": True}, ParameterError, "both runs give"),
        ({"metric": "logit_diff: #11, #999999"}, TokenError, "999999"),
        ({"metric": "accuracy: #11"}, ParameterError, "use logit_diff"),
        ({"kind": "resid_pre", "by": "head"}, ParameterError, "choose kind attn.q or attn.k"),
        ({"draws": 3}, ParameterError, "give at least 5, or 0"),
        ({"corrupt": [63, *CLEAN[1:]], "metric": None}, ParameterError, "both prompts are answered with"),
    ],
)
def test_what_cannot_be_estimated_says_why(params: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        estimated(model("grouped-query"), **params)


@pytest.mark.parametrize("name", ["llava", "qwen-vl"])
def test_images_are_estimated_too(name: str) -> None:
    """Integrated over many steps, what enters the first layer at the image carries what the image changes."""
    of, clean, corrupt = model(name), inputs(name), inputs(name, seed=3)
    low, high = (float(of(run)[0, -1, 11] - of(run)[0, -1, 22]) for run in (corrupt, clean))
    found = estimated(of, clean=clean, corrupt=corrupt, layers="0", positions="image", steps=40, draws=0, verify=0)
    assert float(found.values.sum()) == pytest.approx(high - low, abs=0.02 * max(1.0, abs(high - low)))
