"""Replay gives what one whole forward pass per run gives, on every kind of decoder that it says it can serve."""

import random
from functools import cache

import pytest
import torch

from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Add, Intervention, Mean, Project, Scale, Set, Zero
from cutaway.core.metric import Metric
from cutaway.core.site import Site
from cutaway.engine import replay
from cutaway.models.handle import Model
from cutaway.models.tiny import tiny

REPLAYED = (
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "MixtralForCausalLM",
    "OPTForCausalLM",
    "Olmo2ForCausalLM",
    "GraniteForCausalLM",
    "CohereForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV3ForCausalLM",
)
IMAGES = (
    "LlavaForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
)
PLAIN = ("BloomForCausalLM", "GPTJForCausalLM")
KINDS = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn.out",
    "mlp.out",
    "attn.z",
    "mlp.act",
    "attn.q",
    "attn.k",
    "attn.v",
    "expert.gate",
    "expert.act",
)
CLOSE = 1e-5
"""Largest error allowed, as a fraction of the largest logit or metric."""


@cache
def made(name: str) -> tuple[Model, Inputs]:
    model = tiny(name, "image-text-to-text" if name in IMAGES else "causal-lm")
    given = dict(model.inputs)
    ids = given.pop("input_ids")[:1]
    mask = given.pop("attention_mask", torch.ones_like(ids))[:1]
    words = tuple(f"#{i}" for i in ids[0].tolist())
    return Model(model.hf), Inputs(ids, mask, (words,), (("text",) * ids.shape[1],), given)


def places(model: Model, inputs: Inputs, kind: str) -> list[Site]:
    """In every layer: all positions, the first, a negative one, several; all heads or neurons, one, several."""
    layers = model.layers
    indexed = kind in ("attn.z", "attn.q", "attn.k", "attn.v", "mlp.act", "expert.gate", "expert.act")
    found = []
    for layer in (i for i, plan in enumerate(layers) if plan.has(kind)):
        for positions in (None, 0, -1, [2, inputs.ids.shape[1] - 3]):
            for index in (None, 0, [0, 1]) if indexed else (None,):
                site = Site.parse(f"L{layer}.{kind}")
                found.append(site.at(positions=positions, index=index))
    return found


def noisy(model: Model, inputs: Inputs, sites: list[Site]) -> list[Set]:
    """At each site, a value as large as what is there."""
    generator = torch.Generator().manual_seed(0)
    trace = model.trace(inputs, want=sites)
    return [Set(s, trace[s] + torch.randn(trace[s].shape, generator=generator) * (0.1 + trace[s].abs())) for s in sites]


def compare(model: Model, inputs: Inputs, runs: list, metric: Metric, how: str = "replay", **options: object) -> None:
    fast = replay(model, inputs, runs, metric, **options)
    slow = replay(model, inputs, runs, metric, plain=True)
    assert fast.how.partition(":")[0] == how, fast.how
    size = float(slow.values.abs().max())
    assert float((slow.values - slow.base).abs().max()) > 1e3 * CLOSE * size, "these runs change nothing"
    torch.testing.assert_close(fast.values, slow.values, rtol=0, atol=CLOSE * size)
    torch.testing.assert_close(fast.base, slow.base, rtol=0, atol=CLOSE * size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REPLAYED)
def test_replay_equals_one_pass_per_run(name: str, kind: str) -> None:
    model, inputs = made(name)
    sites = places(model, inputs, kind)
    if not sites:
        assert kind in model.layers[0].refused
        return
    compare(model, inputs, noisy(model, inputs, sites), Metric("logit_diff", (1, 2)))


@pytest.mark.parametrize("kind", ["resid_pre", "attn.z", "mlp.act", "attn.k"])
@pytest.mark.parametrize("name", IMAGES)
def test_replay_equals_one_pass_per_run_with_an_image(name: str, kind: str) -> None:
    model, inputs = made(name)
    compare(model, inputs, noisy(model, inputs, places(model, inputs, kind)), Metric("logit_diff", (1, 2)))


@pytest.mark.parametrize("name", PLAIN)
def test_attention_outside_the_interface_takes_the_plain_path(name: str) -> None:
    model, inputs = made(name)
    compare(model, inputs, noisy(model, inputs, places(model, inputs, "resid_pre")), Metric("logit", (1,)), how="plain")


def several(model: Model, inputs: Inputs, kinds: tuple[str, ...], n: int) -> list[list[Intervention]]:
    """Runs of two to five interventions at places drawn from all of ``kinds``; most depend on what is there by then."""
    draw = random.Random(0)
    pool = [s for kind in kinds for s in places(model, inputs, kind)]
    runs = []
    for sets in (noisy(model, inputs, draw.sample(pool, draw.randint(2, 5))) for _ in range(n)):
        whole = [draw.choice((s, Scale(s.at, 1.7), Add(s.at, 0.3), Zero(s.at), Mean(s.at))) for s in sets]
        runs.append(draw.sample(whole, len(whole)))
    return runs


@pytest.mark.parametrize("name", REPLAYED + IMAGES)
def test_several_interventions_in_a_run(name: str) -> None:
    model, inputs = made(name)
    runs = several(model, inputs, KINDS, 24)
    compare(model, inputs, runs, Metric("logit_diff", (1, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_several_interventions_of_one_kind(kind: str) -> None:
    """In the last layer too, at positions that are not read."""
    model, inputs = made("MixtralForCausalLM" if kind.startswith("expert.") else "LlamaForCausalLM")
    compare(model, inputs, several(model, inputs, (kind,), 8), Metric("logit_diff", (1, 2)))


def test_runs_of_one_and_of_several_together_in_their_order() -> None:
    model, inputs = made("GPT2LMHeadModel")
    runs = [
        Zero("L1.attn.z[0]"),
        [Zero("L1.attn.z[0]"), Scale("L2.mlp.act@-1", 2.0)],
        [Scale("L2.mlp.act@-1", 2.0)],
        [Add("L0.resid_pre@0", 1.0), Scale("L0.resid_pre@0", 3.0)],
        [Scale("L0.resid_pre@0", 3.0), Add("L0.resid_pre@0", 1.0)],
        [Zero("L*.attn.z[1]")],
    ]
    compare(model, inputs, runs, Metric("logit_diff", (1, 2)))
    values = replay(model, inputs, runs, Metric("logit_diff", (1, 2))).values
    assert len(set(values.tolist())) == len(runs)


@pytest.mark.parametrize("metric", [Metric("logprob", (5,), 3), Metric("answer", (4, 5, 6))], ids=str)
def test_several_interventions_and_positions_that_are_not_last(metric: Metric) -> None:
    model, inputs = made("LlamaForCausalLM")
    prepared = metric.prepare(inputs)
    compare(model, inputs, several(model, prepared, ("resid_pre", "attn.v", "mlp.out"), 8), metric)


def test_several_interventions_on_the_plain_path() -> None:
    model, inputs = made("BloomForCausalLM")
    runs = several(model, inputs, ("resid_pre", "mlp.out"), 4)
    compare(model, inputs, runs, Metric("logit", (1,)), how="plain")


def test_several_interventions_within_a_small_budget() -> None:
    model, inputs = made("LlamaForCausalLM")
    compare(model, inputs, several(model, inputs, KINDS, 12), Metric("entropy"), budget=1)


METRICS = (
    Metric("logit", (5,)),
    Metric("logprob", (5,), 3),
    Metric("prob", (5,), -2),
    Metric("entropy"),
    Metric("answer", (4, 5, 6)),
)


@pytest.mark.parametrize("metric", METRICS, ids=str)
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "Gemma2ForCausalLM"])
def test_every_metric(name: str, metric: Metric) -> None:
    model, inputs = made(name)
    prepared = metric.prepare(inputs)
    sites = [s for kind in ("resid_pre", "mlp.out") for s in places(model, prepared, kind)]
    compare(model, inputs, noisy(model, prepared, sites), metric)


def test_kl_against_the_unchanged_run() -> None:
    model, inputs = made("LlamaForCausalLM")
    metric = Metric("kl").against(model(inputs)[:, -1:])
    compare(model, inputs, noisy(model, inputs, places(model, inputs, "resid_pre")), metric)


@pytest.mark.parametrize("kind", ["resid_pre", "attn.z", "mlp.act"])
def test_a_small_budget_splits_the_sweep_and_changes_nothing(kind: str) -> None:
    model, inputs = made("LlamaForCausalLM")
    runs = noisy(model, inputs, places(model, inputs, kind))
    compare(model, inputs, runs, Metric("entropy"), budget=1)


def test_padding_on_either_side() -> None:
    model, _ = made("LlamaForCausalLM")
    for side in ("left", "right"):
        pad = (3, 0) if side == "left" else (0, 3)
        ids = torch.nn.functional.pad(torch.tensor([[5, 6, 7, 8, 9, 10]]), pad)
        mask = torch.nn.functional.pad(torch.ones(1, 6, dtype=torch.long), pad)
        inputs = Inputs(ids, mask, (("",) * 9,), (tuple("text" if m else "pad" for m in mask[0]),))
        sites = [
            Site.parse(f"L{i}.{kind}@{p}") for i in range(3) for kind in ("resid_pre", "attn.v") for p in (0, 3, -1)
        ]
        compare(model, inputs, noisy(model, inputs, sites), Metric("logit_diff", (1, 2)))
        means = [
            Mean("L0.mlp.out"),
            [Mean("L1.attn.v"), Mean("L0.resid_mid")],
            [Mean("L2.mlp.act"), Zero("L1.attn.z@0")],
        ]
        compare(model, inputs, means, Metric("logit_diff", (1, 2)))


def test_any_intervention_can_be_a_run() -> None:
    model, inputs = made("GPT2LMHeadModel")
    d = model.layers[0].d_model
    direction = torch.randn(d, generator=torch.Generator().manual_seed(1))
    runs = [
        Zero("L0.attn.z[1]"),
        Scale("L1.mlp.act[3-9]@-1", 3.0),
        Project("L2.resid_pre", direction),
        Add("L0.mlp.out", 1.0),
    ]
    compare(model, inputs, runs, Metric("logit_diff", (1, 2)))


def test_eager_attention() -> None:
    model, inputs = made("LlamaForCausalLM")
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    try:
        compare(model, inputs, noisy(model, inputs, places(model, inputs, "attn.k")), Metric("logit_diff", (1, 2)))
    finally:
        model.hf.set_attn_implementation(before)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_a_long_shared_prefix(name: str) -> None:
    """Long enough that runs read the keys before them in place."""
    model, _ = made(name)
    ids = torch.randint(1, 90, (1, 60), generator=torch.Generator().manual_seed(2))
    inputs = model.inputs(ids)
    sites = [
        Site.parse(f"L{i}.{kind}@{p}") for i in range(3) for kind in ("resid_pre", "attn.out") for p in (50, 55, 59)
    ]
    compare(model, inputs, noisy(model, inputs, sites), Metric("logit_diff", (1, 2)))


def test_bfloat16_agrees_within_its_rounding() -> None:
    hf = tiny("LlamaForCausalLM").hf.to(torch.bfloat16)
    model, inputs = Model(hf), made("LlamaForCausalLM")[1]
    runs = noisy(model, inputs, places(model, inputs, "attn.z"))
    fast = replay(model, inputs, runs, Metric("logit", (1,)))
    slow = replay(model, inputs, runs, Metric("logit", (1,)), plain=True)
    assert fast.how == "replay"
    size = float(model(inputs).float().abs().max())
    assert float((fast.values - slow.values).abs().max()) <= 4 * torch.finfo(torch.bfloat16).eps * size
