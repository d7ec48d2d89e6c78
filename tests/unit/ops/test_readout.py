"""The frozen readout is the model's own, on whatever lies between the last residual stream and the logits."""

from functools import cache

import pytest
import torch
from torch import nn

from cutaway.core.errors import UnsupportedError
from cutaway.models.handle import Model
from cutaway.models.tiny import tiny
from cutaway.ops.norms import FrozenNorm, measure
from cutaway.ops.readout import Head

NAMES = (
    "GPT2LMHeadModel",  # LayerNorm with biases
    "LlamaForCausalLM",  # RMSNorm
    "GemmaForCausalLM",  # gain 1 + w
    "Gemma2ForCausalLM",  # soft cap
    "GraniteForCausalLM",  # logits divided
    "CohereForCausalLM",  # logits multiplied, LayerNorm without bias
    "GPTJForCausalLM",  # head with bias
    "PhiForCausalLM",
    "OlmoForCausalLM",  # LayerNorm without parameters
    "OPTForCausalLM",
    "MiniCPM3ForCausalLM",  # state divided before the head
)
IDS = [5, 9, 6, 7, 8]


@cache
def run(name, dtype=torch.float32):
    model = Model(tiny(name).hf.to(dtype))
    trace = model.trace([IDS], want=[f"L{model.n_layers - 1}.resid_post@-2--1", "L1.resid_pre@-2--1"])
    final = trace[f"L{model.n_layers - 1}.resid_post@-2--1"][0].float()
    return model, final, trace["L1.resid_pre@-2--1"][0].float(), trace.logits[0, -2:].float()


@pytest.mark.parametrize("name", NAMES)
def test_final_states_give_the_models_logits(name):
    model, final, _, logits = run(name)
    readout = Head(model).frozen(final, logits)
    torch.testing.assert_close(readout.logits(final), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_affine_before_what_follows_the_head(name):
    model, final, early, logits = run(name)
    readout = Head(model).frozen(final, logits)
    parts = torch.stack([0.3 * early, final - early, -0.7 * early])
    torch.testing.assert_close(
        readout.states(early) + readout.project(parts).sum(0), readout.states(final - 0.4 * early), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("name", NAMES)
def test_own_scale_is_the_logit_lens(name):
    model, final, early, logits = run(name)
    readout = Head(model).frozen(final, logits, "own")
    torch.testing.assert_close(readout.logits(early), model.unembed(early).float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_pull_is_the_transpose_of_project(name):
    model, final, early, logits = run(name)
    readout = Head(model).frozen(final, logits)
    dz = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        (readout.project(early) * dz).sum(), (early * readout.pull(dz)).sum(), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("part", [7, 1024])
@pytest.mark.parametrize("scale", ["final", "own", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_log_probability_and_gradient_are_those_of_the_whole_vocabulary(name, scale, part, monkeypatch):
    monkeypatch.setattr("cutaway.ops.readout.CACHED_PART", part)
    model, final, early, logits = run(name)
    readout = Head(model).frozen(final, logits, scale)
    x, ids = torch.stack([early, 20 * early, final]).requires_grad_(), torch.tensor([11, 22])
    z = (readout.head.normed(x) if scale == "own" else readout.entering(x)) @ readout.head.weight.T
    y = readout.finish(z if readout.bias is None else z + readout.bias)
    logp, apart = y.log_softmax(-1)[:, [0, 1], ids], y[..., 11] - y[..., 22]
    slopes = [torch.autograd.grad(of.sum(), x, retain_graph=True)[0] for of in (logp, apart)]
    x, logp = x.detach(), logp.detach()
    found, gradient = readout.logp_and_gradient(x, ids)
    torch.testing.assert_close(readout.logp(x, ids), logp, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found, logp, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, slopes[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(readout.only((11, 22)).gradient_of_difference(x), slopes[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "GemmaForCausalLM"])
def test_bfloat16_within_its_rounding(name):
    model = Model(tiny(name).hf.to(torch.bfloat16))
    last = f"L{model.n_layers - 1}.resid_post@-1"
    trace = model.trace([IDS], want=last)
    readout = Head(model).frozen(trace[last][0], trace.logits[0, -1:])
    error = (readout.logits(trace[last][0].float()) - trace.logits[0, -1:].float()).abs().max()
    assert error < 0.02 * trace.logits.abs().max()


def test_soft_cap_is_measured():
    model, *_ = run("Gemma2ForCausalLM")
    slope, cap = Head(model).slope_and_cap
    assert slope == pytest.approx(1.0, rel=1e-4)
    assert cap == pytest.approx(model.hf.config.final_logit_softcapping, rel=1e-5)
    assert Head(run("GraniteForCausalLM")[0]).slope_and_cap[0] == pytest.approx(
        1 / run("GraniteForCausalLM")[0].hf.config.logits_scaling, rel=1e-4
    )


def test_none_divides_by_nothing():
    model, final, early, logits = run("LlamaForCausalLM")
    readout = Head(model).frozen(final, logits, "none")
    gain = model.hf.model.norm.weight
    torch.testing.assert_close(readout.states(early), (early * gain) @ model.hf.lm_head.weight.T, rtol=1e-4, atol=1e-4)


def test_logits_of_another_run_are_refused():
    model, final, _, logits = run("LlamaForCausalLM")
    with pytest.raises(UnsupportedError, match="off by"):
        Head(model).frozen(final, logits + 1.0)


class Odd(nn.Module):
    def forward(self, x):
        return x * x.abs()


@pytest.mark.parametrize("d", [7, 16])
@pytest.mark.parametrize("module", [nn.LayerNorm, nn.RMSNorm, "none"])
def test_norms_are_measured(module, d):
    torch.manual_seed(0)
    layer = nn.Linear(1, 1) if module == "none" else module(d)
    if module == "none":
        function, gain, shift = (lambda x: 3.0 * x), torch.full((d,), 3.0), torch.zeros(d)
    else:
        nn.init.normal_(layer.weight)
        gain, shift, function = layer.weight.detach(), torch.zeros(d), layer
        if getattr(layer, "bias", None) is not None:
            nn.init.normal_(layer.bias)
            shift = layer.bias.detach()
    norm = measure(function, d, torch.device("cpu"), torch.float32, "this norm")
    torch.testing.assert_close(norm.gain, gain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.shift, shift, rtol=1e-5, atol=1e-5)
    assert (norm.centres, norm.divides) == (module is nn.LayerNorm, module != "none")
    x, v = torch.randn(3, d), torch.randn(3, d)
    with torch.no_grad():
        frozen = FrozenNorm(norm, norm.inverse_scale(x, function(x)))
        torch.testing.assert_close(frozen(x) + norm.shift, function(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frozen(x) + frozen(v), frozen(x + v), rtol=1e-4, atol=1e-5)


def test_what_is_no_norm_is_refused():
    with pytest.raises(UnsupportedError, match="neither a norm"):
        measure(Odd(), 8, torch.device("cpu"), torch.float32, "this module")
    with pytest.raises(UnsupportedError, match=r"takes no single states \(IndexError\)"):
        measure(lambda x: x.transpose(1, 2), 8, torch.device("cpu"), torch.float32, "this module")
