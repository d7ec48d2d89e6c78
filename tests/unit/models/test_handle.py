"""Model: what it says of itself, names of sites, readout, and every refusal as one sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cutaway.core.errors import (
    CutawayError,
    ImageError,
    InputError,
    InterventionError,
    MismatchError,
    ModelError,
    SiteMissingError,
    SiteRangeError,
    SiteSyntaxError,
    UnsupportedError,
    WeightsError,
)
from cutaway.core.intervention import Project, Set, Swap, Zero
from cutaway.models.handle import Model
from tests.architectures import ARCHITECTURES, PROMPT, ROWS, fresh, gap, inputs, model


def test_it_says_what_it_is() -> None:
    of = model("grouped-query")
    assert repr(of) == "Model('grouped-query', LlamaForCausalLM, torch.float32, cpu)"
    assert (of.n_layers, len(of.layers), of.processor) == (3, 3, None)
    assert Model(of.hf).name == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_residual_stream_reads_out_as_the_logits(name: str) -> None:
    of, given = model(name), inputs(name)
    trace = of.trace(given, want="L-1.resid_post")
    assert gap(of.unembed(trace["L-1.resid_post"]), trace.logits) < 1e-5
    assert gap(of.readout(trace["L-1.resid_post"]).exp().sum(-1), torch.ones(given.ids.shape)) < 1e-5
    assert of.unembed(trace["L-1.resid_post"][0, -1]).shape == trace.logits.shape[-1:]


def test_three_names_are_one_site() -> None:
    of, given = model("dense"), inputs("dense")
    trace = of.trace(given, want=["L2.resid_post", "blocks.1.attn.hook_z", "transformer.h.0.mlp", "L-1.resid_mid"])
    assert torch.equal(trace["blocks.2.hook_resid_post"], trace["L-1.resid_post"])
    assert torch.equal(trace["L1.attn.z"], trace["blocks.1.attn.hook_z"])
    assert torch.equal(trace["transformer.h.0.mlp"], trace["L0.mlp.out"])
    assert "L2.resid_mid" in trace
    assert "blocks.2.hook_resid_mid" in trace
    assert "L0.resid_mid" not in trace
    assert "no site" not in trace
    with pytest.raises(SiteMissingError, match=r"this trace.*it holds 4 sites"):
        _ = trace["L0.attn.z"]
    by_path = of.trace(given, do=Zero("transformer.h.1.mlp")).logits
    assert torch.equal(by_path, of.trace(given, do="zero L1.mlp.out").logits)
    with pytest.raises(SiteSyntaxError, match="no site is read at that module"):
        of.trace(given, want="transformer.h.0.mlp.act")


def test_traces_stack_over_the_layers_that_were_read() -> None:
    of, given = model("dense"), inputs("dense")
    trace = of.trace(given, want="L*.resid_post@-1, L0.attn.z")
    assert trace.stack("L*.resid_post@-1").shape == (3, 1, 1, 64)
    assert torch.equal(trace.stack("L2+0.resid_post@-1")[0], trace["L2.resid_post@-1"])
    assert trace.stack("L*.attn.z").shape[0] == 1
    assert "4 sites" in repr(trace)
    assert len(trace) == 4
    assert len(of.trace(given, want=["L0.attn.z", "L*.attn.z"])) == 3


@pytest.mark.parametrize(
    ("use", "error", "sentence"),
    [
        ({"want": "L3.attn.z"}, SiteRangeError, "site 'L3.attn.z': layer 3 is not there: the valid layers are 0-2"),
        ({"want": "L-4.attn.z"}, SiteRangeError, "layer -4 is not there: the valid layers are 0-2"),
        ({"want": "L0.attn.z[4]"}, SiteRangeError, "head 4 is not there: the valid heads are 0-3"),
        ({"want": "L0.attn.k[2]"}, SiteRangeError, "kv_head 2 is not there: the valid kv_heads are 0-1"),
        ({"want": "L0.mlp.act[96]"}, SiteRangeError, "neuron 96 is not there: the valid neurons are 0-95"),
        ({"want": "L0.resid_post@9"}, SiteRangeError, "position 9 is not there: the valid positions are 0-8"),
        ({"want": "L0.resid_post@image"}, SiteRangeError, "the inputs have no image position"),
        (
            {"want": "L0.expert.act"},
            SiteMissingError,
            "has no experts that transformers' interface serves; layer 0 has",
        ),
        ({"want": "L0.sae"}, SiteMissingError, "no dictionary is attached"),
        ({"want": "projector"}, SiteMissingError, "the model has no vision tower"),
        ({"want": "vision/L0.attn.z"}, SiteMissingError, "no layers in scope 'vision'; scopes: no prefix"),
        ({"want": "L0.attn.zz"}, SiteSyntaxError, "did you mean 'attn.z'"),
        ({"do": "zero L9.mlp.out"}, SiteRangeError, "layer 9"),
        ({"do": "clear L0.mlp.out"}, InterventionError, "it must start with zero, mean, scale, add, set"),
        ({"do": "scale L0.mlp.out"}, InterventionError, "it has 2 words; write 'scale SITE NUMBER'"),
        ({"do": "scale L0.mlp.out x"}, InterventionError, "'x' is not a number"),
        (
            {"do": Set("L0.mlp.out", torch.zeros(3))},
            InterventionError,
            r"the value is \[3\], the place is \[1, 9, 64\]",
        ),
        ({"do": Project("L0.mlp.out", torch.ones(3))}, InterventionError, "3 numbers, the last axis 'd_model' has 64"),
        ({"grad": "logprob"}, CutawayError, "it takes 1 tokens and got 0"),
    ],
)
def test_refusals_name_what_was_asked_and_what_there_is(
    use: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    of, given = model("grouped-query"), inputs("grouped-query")
    plain = of(given)
    with pytest.raises(error, match=sentence):
        of.trace(given, **use)
    assert torch.equal(of(given), plain)


def test_more_refusals() -> None:
    of = model("grouped-query")
    with pytest.raises(InputError, match="600 tokens and the model 512 positions; shorten it to 512"):
        of.trace(list(range(100)) * 6)
    with pytest.raises(SiteMissingError, match="side by side"):
        model("parallel").trace([PROMPT], want="L0.resid_mid")
    with pytest.raises(SiteMissingError, match=r"mixture of experts: read expert\.act"):
        model("experts").trace([PROMPT], want="L0.mlp.act")
    with pytest.raises(SiteRangeError, match="expert 4 is not there"):
        model("experts").trace([PROMPT], want="L0.expert.act[4]")
    with pytest.raises(SiteRangeError, match="neuron 96 is not there: the valid neurons are 0-95"):
        model("experts").trace([PROMPT], want="L0.expert.act[0/96]")
    model("llava").anatomy(inputs("llava"))
    with pytest.raises(InputError, match="the inputs bring no image"):
        model("llava").trace([PROMPT], want="vision/L0.resid_post")
    with pytest.raises(SiteMissingError, match="attends in 4 separate chunks"):
        model("qwen-vl").trace(inputs("qwen-vl"), want="vision/L0.attn.z@3")
    with pytest.raises(InterventionError, match="chunk by chunk"):
        model("qwen-vl").trace(inputs("qwen-vl"), do="mean vision/L0.attn.z")
    roles = (("special",) * 2 + ("text",) * 7, ("special",) + ("text",) * 8)
    batch = replace(of.inputs([PROMPT, PROMPT]), roles=roles)
    with pytest.raises(MismatchError, match=r"rows have \[2, 1\] special positions"):
        of.trace(batch, want="L0.resid_post@special")
    with pytest.raises(SiteMissingError, match="it holds"):
        of.trace([PROMPT], do=Swap("L0.attn.z", of.trace([PROMPT], want="L1.attn.z")))
    with pytest.raises(UnsupportedError, match="no single output matrix"):
        of.weight("L0.attn.q")
    with pytest.raises(ModelError, match="got str"):
        Model("llama")  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_named() -> None:
    of = fresh("dense")
    of.hf.get_submodule("transformer.h.2.mlp.c_proj").weight.data[3, 3] = float("inf")
    with pytest.raises(WeightsError, match=r"transformer\.h\.2\.mlp\.c_proj\.weight holds NaN or infinite values"):
        of.trace([PROMPT])


def test_a_padded_batch_does_not_make_the_anatomy_be_read_again() -> None:
    of = fresh("grouped-query")
    first = of.anatomy()
    of.trace(of.inputs(list(ROWS), padding_side="left"), want="L0.resid_post")
    assert of.anatomy() is first


def test_an_image_that_the_model_refuses_is_named_with_its_size() -> None:
    from PIL import Image

    from cutaway.models.load import load

    model = load("scenes")
    with pytest.raises(ImageError, match="50x70"):
        model.trace(model.inputs("what is it?", Image.new("RGB", (50, 70))), want="L0.resid_post")
    model.trace(model.inputs("what is it?", Image.new("RGB", (48, 48))), want="vision/L0.resid_post")


@pytest.mark.parametrize("name", ["dense", "parallel"])
def test_a_run_that_keeps_its_graph_may_stop_before_the_logits(name: str) -> None:
    of = model(name)
    last = f"L{of.n_layers - 1}.resid_post"
    trace = of.trace([PROMPT], want=["L0.resid_pre", last], grad=True, stop=True)
    assert trace.logits is None
    (stopped,) = torch.autograd.grad(trace[last].square().sum(), trace["L0.resid_pre"])
    whole = of.trace([PROMPT], want=["L0.resid_pre", last], grad=True)
    assert whole.logits is not None
    (through,) = torch.autograd.grad(whole[last].square().sum(), whole["L0.resid_pre"])
    torch.testing.assert_close(stopped, through)
