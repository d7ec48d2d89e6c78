"""Patching against a loop of hooks written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cutaway import catalog
from cutaway.core.errors import InputError, MismatchError, ParameterError
from cutaway.core.intervention import Set
from cutaway.results import Grid
from tests.architectures import inputs, model

CLEAN, CORRUPT = [70, 71, 72, 73, 74, 75], [70, 90, 72, 93, 74, 75]


def patch(name: str, **params: Any) -> Grid:
    given = {"clean": CLEAN, "corrupt": CORRUPT, "metric": "logit_diff: #11, #22", **params}
    found = catalog.run("patch", model(name), **given)
    assert isinstance(found, Grid)
    assert found.check is not None
    assert found.check.holds
    return found


def kept(name: str, path: str, ids: list[int]) -> Tensor:
    """What a module gives out (or takes in, for output matrices), by a plain hook."""
    seen: list[Tensor] = []
    module = model(name).hf.get_submodule(path)
    if path.endswith(("o_proj", "down_proj")):
        handle = module.register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
    else:
        first = lambda out: out if isinstance(out, Tensor) else out[0]  # noqa: E731
        handle = module.register_forward_hook(lambda m, a, o: seen.append(first(o).clone()))
    with torch.no_grad():
        model(name).hf(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    return seen[0]


def run(name: str, path: str, ids: list[int], change: Callable[[Tensor], None]) -> Tensor:
    """Last logits with a module's tensor changed in place by a plain hook."""
    module = model(name).hf.get_submodule(path)

    def before(m: Any, args: Any) -> Any:
        x = args[0].clone()
        change(x)
        return (x, *args[1:])

    def after(m: Any, args: Any, out: Any) -> Any:
        x = (out if isinstance(out, Tensor) else out[0]).clone()
        change(x)
        return x if isinstance(out, Tensor) else (x, *out[1:])

    into = path.endswith(("o_proj", "down_proj"))
    handle = module.register_forward_pre_hook(before) if into else module.register_forward_hook(after)
    with torch.no_grad():
        logits: Tensor = model(name).hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    handle.remove()
    return logits


def difference(logits: Tensor) -> float:
    return float(logits[11] - logits[22])


@pytest.mark.parametrize("direction", ["clean->corrupt", "corrupt->clean"])
@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("resid_post", "model.layers.{}"),
        ("attn.out", "model.layers.{}.self_attn"),
        ("mlp.out", "model.layers.{}.mlp"),
        ("mlp.act", "model.layers.{}.mlp.down_proj"),
        ("attn.z", "model.layers.{}.self_attn.o_proj"),
    ],
)
def test_by_position_it_is_the_loop(kind: str, path: str, direction: str) -> None:
    name = "grouped-query"
    gives, gets = (CLEAN, CORRUPT) if direction == "clean->corrupt" else (CORRUPT, CLEAN)
    low, high = (difference(model(name)([ids])[0, -1]) for ids in (gets, gives))
    found = patch(name, kind=kind, direction=direction)
    raw = patch(name, kind=kind, direction=direction, normalise=False)
    for layer in range(3):
        source = kept(name, path.format(layer), gives)
        for p in range(len(CLEAN)):

            def change(x: Tensor, p: int = p, source: Tensor = source) -> None:
                x[:, p] = source[:, p]

            value = difference(run(name, path.format(layer), gets, change))
            assert raw.values[layer, p] == pytest.approx(value, abs=2e-4)
            assert found.values[layer, p] == pytest.approx((value - low) / (high - low), abs=2e-3)


def test_by_head_and_by_neurons_it_is_the_loop() -> None:
    name = "grouped-query"
    heads = patch(name, kind="attn.z", by="head", positions="1-3", normalise=False)
    neurons = patch(name, kind="mlp.act", by="neurons", blocks=5, layers="1", normalise=False)
    assert neurons.labels["neurons"] == ("0-18", "19-37", "38-57", "58-76", "77-95")
    source = kept(name, "model.layers.1.self_attn.o_proj", CLEAN)
    for head in range(4):

        def change(x: Tensor, head: int = head) -> None:
            x[:, 1:4, head * 16 : head * 16 + 16] = source[:, 1:4, head * 16 : head * 16 + 16]

        value = difference(run(name, "model.layers.1.self_attn.o_proj", CORRUPT, change))
        assert heads.values[1, head] == pytest.approx(value, abs=2e-4)
    acts = kept(name, "model.layers.1.mlp.down_proj", CLEAN)
    for i, label in enumerate(neurons.labels["neurons"]):
        low, high = map(int, str(label).split("-"))

        def block(x: Tensor, low: int = low, high: int = high) -> None:
            x[..., low : high + 1] = acts[..., low : high + 1]

        value = difference(run(name, "model.layers.1.mlp.down_proj", CORRUPT, block))
        assert neurons.values[0, i] == pytest.approx(value, abs=2e-4)


@pytest.mark.parametrize("name", ["dense", "parallel", "sliding-softcap", "experts", "no-interface", "both-ways"])
def test_recovery_is_none_where_nothing_differs_and_whole_at_the_end(name: str) -> None:
    found = patch(name, kind="resid_post")
    one = patch(name, kind="resid_post", corrupt=[70, 90, 72, 73, 74, 75])
    if name != "both-ways":  # before the first difference nothing can be restored
        assert abs(found.values[:, 0]).max() < 1e-4
    assert found.values[-1, -1] == pytest.approx(1, abs=1e-4)
    assert abs(found.values[-1, :-1]).max() < 1e-4
    embedded = patch(name, kind="resid_pre", corrupt=[70, 90, 72, 73, 74, 75], layers="0")
    assert embedded.values[0, 1] == pytest.approx(1, abs=1e-4)  # the one word that differs, before anything read it
    assert one.values.shape == (3, 6)


def test_metrics_that_compare_or_read_several_tokens() -> None:
    name = "grouped-query"
    of = model(name)
    kl = patch(name, metric="kl", kind="resid_post", normalise=False)
    p, q = (of([ids])[0, -1].log_softmax(-1) for ids in (CLEAN, CORRUPT))
    assert kl.values[-1, -1] == pytest.approx(0, abs=1e-5)
    assert kl.values[-1, 0] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
    answer = patch(name, metric="answer: #11, #22, #33", kind="resid_post", normalise=False)
    longer = of([[*CORRUPT, 11, 22]])[0, -3:].log_softmax(-1)
    forced = float(longer[0, 11] + longer[1, 22] + longer[2, 33])
    assert answer.values[2, 0] == pytest.approx(forced, abs=1e-4)
    assert answer.values.shape == (3, len(CLEAN))


@pytest.mark.parametrize("name", ["llava", "qwen-vl"])
def test_two_images_and_one_question(name: str) -> None:
    clean, corrupt = inputs(name), inputs(name, seed=3)
    at_image = {"kind": "resid_pre", "positions": "image", "layers": "0-1", "normalise": False}
    found = patch(name, clean=clean, corrupt=corrupt, **at_image)
    source = model(name).trace(clean, want="L0.resid_pre")["L0.resid_pre"]
    at = [p for p, role in enumerate(clean.roles[0]) if role == "image"]
    for i, p in enumerate(at[:3]):
        logits = model(name).trace(corrupt, do=Set(f"L0.resid_pre@{p}", source[:, p : p + 1])).logits[0, -1]
        assert found.values[0, i] == pytest.approx(difference(logits), abs=2e-4)


@pytest.mark.parametrize(
    ("params", "error", "sentence"),
    [
        ({"corrupt": [70, 90, 72]}, MismatchError, r"row 0 has 6 and 3 tokens, first different at position 1: \['#71'"),
        ({"corrupt": CLEAN}, MismatchError, "they are the same"),
        ({"metric": "logit_diff: #11, #22 @0"}, ParameterError, "both runs give"),
        ({"kind": "resid_pre", "by": "head"}, ParameterError, "choose kind attn.q or attn.k"),
        ({"kind": "attn.z", "by": "neurons"}, ParameterError, "choose kind mlp.act"),
        ({"kind": "resid"}, ParameterError, "'resid_pre'"),
        ({"layers": "7"}, LookupError, "layer 7 is not there"),
        ({"positions": "8"}, LookupError, "position 8 is not there"),
        ({"metric": "logit_dif: #1, #2"}, ParameterError, "did you mean 'logit_diff'"),
        ({"clean": [1] * 600, "corrupt": [2] * 600}, InputError, "600 tokens and the model 512 positions"),
    ],
)
def test_what_cannot_be_patched_says_why(params: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        patch("grouped-query", **params)


def test_a_kind_that_the_model_lacks_is_named_with_the_reason() -> None:
    with pytest.raises(LookupError, match="side by side"):
        patch("parallel", kind="resid_mid")
