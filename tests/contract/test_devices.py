"""Everything runs where the model is: on the pretend accelerator each method says what it says on the CPU.

The device is tests/pretend.py, which raises where CUDA would. Attention is compared through torch's plain formula,
which is what the pretend device runs; the CPU's fused one rounds otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

import cutaway
from cutaway.core.errors import CutawayError
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Add, Apply, Mean, Project, Scale, Set, Swap, Zero
from cutaway.core.result import Result
from cutaway.core.trace import Trace
from cutaway.engine.replay import replay
from cutaway.explain import explain
from cutaway.models.doctor import examine
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.results import open_result
from tests import architectures
from tests.contract.test_methods import EACH, model, run
from tests.pretend import Pretend

TWO = pytest.mark.parametrize("name", ["grouped-query", "llava"])
MORE = pytest.mark.parametrize("name", ["dense", "grouped-query", "sliding-softcap", "experts", "llava"])
DEVICE = "pretend:0"
METRIC = "logit_diff: #20, #30"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _plain_attention() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


@cache
def _moved(shared: Model) -> Model:
    return Model(copy.deepcopy(shared.hf).to(DEVICE), shared.processor, name=shared.name)


def far(name: str) -> Model:
    """The shared model of an architecture, on the device."""
    return _moved(architectures.model(name))


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether a tensor of the device holds the CPU's numbers."""
    return isinstance(found, Pretend) and torch.allclose(found.cpu(), expected, **CLOSE)


def said(method: str, of: Model) -> Result | str:
    """What a method says, or why it refuses."""
    try:
        return run(method, of)
    except CutawayError as error:
        return str(error)


@TWO
@EACH
def test_each_method_says_what_it_says_on_the_cpu(method: str, name: str, tmp_path: Path) -> None:
    near = model(method, name)
    expected, found = (said(method, of) for of in (near, _moved(near)))
    if isinstance(expected, str) or isinstance(found, str):  # refused
        assert found == expected
        return
    assert found.made_by is not None
    assert found.made_by.device == DEVICE
    assert found.same_as(expected, **CLOSE).lines == ()
    assert found.check is None or found.check.holds
    assert open_result(found.save(tmp_path / "result")) == found


@MORE
def test_every_site_and_its_gradient_are_the_cpus(name: str) -> None:
    traces: list[Trace] = []
    for of in (architectures.model(name), far(name)):
        given = architectures.inputs(name, of)
        traces.append(of.trace(given, want=architectures.every_site(of, given), grad=METRIC))
    expected, found = traces
    assert found.keys() == expected.keys()
    assert all(same(found[site], expected[site]) for site in expected)
    assert found.grads.keys() == expected.grads.keys()
    assert all(same(found.grads[site], expected.grads[site]) for site in expected.grads)
    assert same(found.logits, expected.logits)


def interventions(of: Model, given: Inputs) -> list[Any]:
    """One of each kind; directions are on the CPU, as users bring them, what is swapped in is where the model is."""
    vector = torch.randn(of.layers[0].d_model, generator=torch.Generator().manual_seed(0))
    return [
        Zero("L0.attn.z[1]@2"),
        Set("L1.resid_pre@3", vector),
        Set("L1.mlp.act[3]", 0.5),
        Add("L0.resid_mid@-1", vector),
        Scale("L1.attn.out", 2.0),
        Mean("L0.mlp.out@1-4"),
        Project("L1.resid_pre", vector),
        Swap("L1.resid_pre@2", of.trace(given, want="L0.resid_post@4"), "L0.resid_post@4"),
        Apply("L0.attn.pattern", lambda x, where: x.flip(-1)),
    ]


def test_every_intervention_is_the_cpus() -> None:
    near, there = architectures.model("dense"), far("dense")
    given = architectures.inputs("dense", near)
    ours, theirs = interventions(there, given), interventions(near, given)
    assert {type(item) for item in ours} == set(_kinds())
    plain = near(given)
    for one, other in zip(ours, theirs, strict=True):
        expected = near.trace(given, do=other).logits
        assert not torch.allclose(expected, plain), other
        assert same(there.trace(given, do=one).logits, expected), one
    swept, exact = (replay(of, given, items[:-1], METRIC) for of, items in ((there, ours), (near, theirs)))
    assert swept.how == exact.how == "replay"
    assert swept.values.device == swept.base.device == torch.device("cpu")
    assert torch.allclose(swept.values, exact.values, **CLOSE)


def _kinds() -> Iterator[type]:
    """Every kind of intervention that can be made."""
    from cutaway.core import intervention

    base = intervention.Intervention
    for value in vars(intervention).values():
        if (
            isinstance(value, type)
            and issubclass(value, base)
            and value is not base
            and not value.__name__.startswith("_")
        ):
            yield value


@TWO
def test_generation_goes_on_around_interventions(name: str) -> None:
    said = []
    for of in (architectures.model(name), far(name)):
        given = architectures.inputs(name, of)
        with of.doing([Scale("L1.attn.out", 3.0)]):
            said.append(of.hf.generate(**given.kwargs(of.device), max_new_tokens=3, do_sample=False).tolist())
    assert said[0] == said[1]


@TWO
def test_a_model_is_examined_as_on_the_cpu(name: str) -> None:
    near, there = (examine(of, architectures.inputs(name, of)) for of in (architectures.model(name), far(name)))
    assert [(f.claim, f.places, f.holds) for f in there] == [(f.claim, f.places, True) for f in near]


def test_a_specimen_is_loaded_there_and_explained(tmp_path: Path) -> None:
    near, there = load("planted-llama"), load("planted-llama", device=DEVICE)
    assert {p.device for p in there.hf.parameters()} == {torch.device(DEVICE)}
    prompt = " ".join(near.decode(i).strip() for i in (5, 9, 6, 7, 8))
    found, expected = (explain(of, prompt, k=3) for of in (there, near))
    assert found.parts.keys() == expected.parts.keys()
    assert found.refused == expected.refused
    assert all(found.parts[part].same_as(expected.parts[part], **CLOSE).lines == () for part in expected.parts)
    assert cutaway.open(found.save(tmp_path / "told")) == found


def test_a_result_made_there_is_made_again_on_the_cpu(tmp_path: Path) -> None:
    folder = run("attribution_patching", far("grouped-query")).save(tmp_path / "result")
    again = cutaway.rerun(folder, architectures.model("grouped-query"))
    assert again.equal, str(again)
    assert any("device" in note for note in again.notes)


def test_what_is_watched_or_checked_first_draws_no_random_number_of_the_device() -> None:
    of = Model(copy.deepcopy(architectures.model("dense").hf).to(DEVICE).train())
    given = architectures.inputs("dense", of)
    states = []
    for watched in (False, True, True):  # twice: the anatomy is read first, and known then
        torch.manual_seed(0)
        if watched:
            of.trace(given, want="L*.attn.pattern")
        else:
            of.hf(**given.kwargs(of.device))
        states.append(torch.pretend.get_rng_state())  # type: ignore[attr-defined]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


# -- layers on several devices -----------------------------------------------------------------------------------------
def spread(name: str, first: str, later: str) -> Model:
    """A model with embedding and first layer on one device and the rest on another, laid out as accelerate does it."""
    near = architectures.model(name)
    hf = copy.deepcopy(near.hf)
    places = dict.fromkeys((*(layer.path for layer in near.layers[1:]), "model.norm", "lm_head"), later)
    places |= dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), first)
    for path, place in places.items():

        def moved(module: nn.Module, args: Any, kwargs: Any, place: str = place) -> Any:
            return tree_map(lambda x: x.to(place) if isinstance(x, Tensor) else x, (args, kwargs))

        hf.get_submodule(path).to(place).register_forward_pre_hook(moved, with_kwargs=True)
    return Model(hf, name=name)


@pytest.mark.parametrize(("first", "later"), [(DEVICE, "cpu"), ("cpu", DEVICE), (DEVICE, "pretend:1")])
def test_a_spread_model_is_read_and_changed(first: str, later: str) -> None:
    near, of = architectures.model("grouped-query"), spread("grouped-query", first, later)
    given = architectures.inputs("grouped-query", near)
    assert of.devices == (torch.device(first), torch.device(later))
    do = [Scale("L0.attn.z[1]", 2.0), Add("L1.resid_pre@3", torch.ones(of.layers[0].d_model)), Zero("L1.mlp.act[3]")]
    sites = architectures.every_site(near, given)
    expected, found = (m.trace(given, want=sites, do=do) for m in (near, of))
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[site].cpu(), expected[site], **CLOSE) for site in expected)
    assert {x.device for x in found.values()} == set(of.devices)
    assert torch.allclose(of(given).cpu(), near(given), **CLOSE)


SPREADABLE = {"ablate", "attention_pattern", "information_flow", "logit_lens"}
"""Methods that serve a model whose layers lie on several devices."""


@EACH
def test_a_method_is_right_on_a_spread_model_or_says_why_it_is_not(method: str) -> None:
    near, of = architectures.model("grouped-query"), spread("grouped-query", DEVICE, "cpu")
    expected, found = said(method, near), said(method, of)
    if isinstance(expected, str) or isinstance(found, str):
        assert method not in SPREADABLE
        assert found == expected or ("its weights lie on" in str(found) and "load it on one device" in str(found))
    else:
        assert found.same_as(expected, **CLOSE).lines == ()


@pytest.mark.parametrize("name", ["grouped-query", "experts"])
@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("patch", {"kind": "attn.z", "by": "head"}),
        ("attribution_patching", {"kind": "attn.z", "by": "head", "steps": 2, "answers": [11, 12], "rivals": [22, 23]}),
        ("attribution_patching", {"answers": [11, 12], "budget": 1}),
        ("path_patching", {"receivers": "L2.attn.v", "answers": [11, 12]}),
        ("causal_trace", {"subject": ["#71", "#9"], "samples": 2, "normalise": False}),
    ],
)
def test_several_pairs_say_what_they_say_on_the_cpu(method: str, params: dict[str, Any], name: str) -> None:
    clean, corrupt = [[70, 71, 72, 73], [5, 9, 6, 7]], [[70, 90, 72, 93], [5, 4, 6, 8]]
    prompts = {"prompt": clean} if method == "causal_trace" else {"clean": clean, "corrupt": corrupt}
    measured = {} if "answers" in params else {"metric": METRIC}
    expected, found = (
        cutaway.run(method, of, **prompts, **measured, **params) for of in (architectures.model(name), far(name))
    )
    assert found.standard_error is not None
    assert found.same_as(expected, rtol=1e-3, atol=1e-4).lines == ()
