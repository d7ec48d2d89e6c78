"""Layers that are built another way: mixers in place of attention, gates, what is added between layers, encoders."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from cutaway.core.errors import CutawayError, InputError, ParameterError, SiteMissingError, UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Set, Zero
from cutaway.methods.locate.head_kinds import head_kinds
from cutaway.methods.locate.in_context_heads import in_context_heads
from cutaway.methods.locate.neuron_attribution import neuron_attribution
from cutaway.methods.locate.neuron_chain import neuron_chain
from cutaway.methods.locate.neuron_sources import neuron_sources
from cutaway.methods.prove.attribution_patching import attribution_patching
from cutaway.methods.prove.path_patching import path_patching
from cutaway.methods.see.attention_pattern import attention_pattern
from cutaway.models.doctor import examine
from cutaway.models.handle import Model
from cutaway.models.tiny import tiny
from cutaway.ops.flow import flow
from cutaway.ops.parts import take_apart
from cutaway.ops.subkeys import find_values, totals
from cutaway.ops.texts import plain_ids
from tests.architectures import PROMPT, gap

IMAGE_TEXT = "image-text-to-text"
CLOSE = 1e-5
MIXERS = [
    "Qwen3NextForCausalLM",  # linear attention
    "BambaForCausalLM",  # a state space
    "Lfm2ForCausalLM",  # a short convolution, which does not hear signs
    "RecurrentGemmaForCausalLM",  # a gated recurrence
]
GATED = "Qwen3NextForCausalLM"  # its last layer attends, and gates what heads give


@cache
def model(name: str, task: str = "causal-lm") -> Model:
    return Model(tiny(name, task).hf, name=name)


@cache
def with_image(name: str) -> tuple[Model, Inputs]:
    built = tiny(name, IMAGE_TEXT)
    of = Model(built.hf, name=name)
    return of, of.inputs(dict(built.inputs))


# -- mixers -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MIXERS)
def test_what_mixes_positions_is_attn_out_and_the_rest_is_the_mlp(name: str) -> None:
    of = model(name)
    mixing = [i for i, layer in enumerate(of.layers) if not layer.has("attn.z")]
    assert mixing
    for i in mixing:
        assert of.layers[i].has("attn.out")
        assert of.layers[i].has("mlp.out")
        assert "softmax" in of.layers[i].refused["attn.z"]
        sites = [f"L{i}.attn.out", f"L{i}.mlp.out", f"L{i}.resid_mid"]
        trace = of.trace(PROMPT, want=[*sites, f"L{i}.resid_pre"])
        changed = trace[f"L{i}.resid_pre"].clone()
        changed[:, -2] = trace[f"L{i}.resid_pre"][:, 0]
        moved = of.trace(PROMPT, want=sites[0], do=Set(f"L{i}.resid_pre", changed))
        assert gap(moved[sites[0]][:, -1], trace[sites[0]][:, -1]) > 1e-2
        changed = trace[sites[2]].clone()
        changed[:, -2] = trace[sites[2]][:, 0]
        moved = of.trace(PROMPT, want=sites[1], do=Set(sites[2], changed))
        assert gap(moved[sites[1]][:, -1], trace[sites[1]][:, -1]) < CLOSE
    assert all(finding.holds for finding in examine(of))


def test_a_mixer_beside_attention_is_part_of_what_attention_adds() -> None:
    of = model("FalconH1ForCausalLM")
    assert of.layers[0].terms == 2
    assert all(finding.holds for finding in examine(of))
    with pytest.raises(UnsupportedError, match="lies more than a factor"):
        in_context_heads(of, ["#70 #71 #80 #72 #73", "#74 #72 #75 #71 #76"], labels=[71, 72], draws=0)


def test_a_layer_that_is_a_mixer_alone_has_no_mlp() -> None:
    layer = model("MambaForCausalLM").layers[0]
    assert layer.has("attn.out")
    assert "0 MLP terms" in layer.refused["mlp.out"]
    parts = take_apart(model("MambaForCausalLM"), model("MambaForCausalLM").inputs(PROMPT), 1, "layer")
    assert parts.identity_error < CLOSE
    assert all(each.mlp is None and each.attn is not None for each in parts.layers)


def test_a_bias_that_is_added_by_itself_belongs_to_what_it_is_added_to() -> None:
    of = model("GPTNeoXJapaneseForCausalLM")
    assert all(layer.terms == 2 and layer.has("mlp.act") for layer in of.layers)
    assert neuron_attribution(of, PROMPT, k=3).check.holds  # type: ignore[union-attr]


def test_a_layer_of_which_a_term_is_not_told_is_not_taken_apart() -> None:
    of, inputs = with_image("EvollaForProteinText2Text")
    assert of.anatomy(inputs).stacks[""][0].terms > 2
    with pytest.raises(UnsupportedError, match="adds 3 MLP terms"):
        take_apart(of, inputs, 1, "layer")


def test_a_layer_that_runs_several_times_in_a_pass_is_refused() -> None:
    with pytest.raises(SiteMissingError, match="runs 6 times in one pass"):
        model("HrmTextForCausalLM").trace(PROMPT, want="L0.resid_post")


def test_attention_called_twice_on_all_positions_is_refused() -> None:
    with pytest.raises(SiteMissingError, match="called 2 times on all 13 positions"):
        attention_pattern(model("DiffLlamaForCausalLM"), PROMPT)


# -- gates ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reads", [1, 3])
@pytest.mark.parametrize("level", ["head", "head-position"])
def test_what_a_gated_head_writes_is_what_goes_with_it(level: str, reads: int) -> None:
    of = model(GATED)
    inputs = of.inputs(PROMPT)
    parts = take_apart(of, inputs, reads, level)  # type: ignore[arg-type]
    assert parts.groups
    for group in parts.groups:
        assert of.layers[group.layer].gated
        vectors = group.vectors(torch.arange(len(group))).unflatten(0, (-1, group.per_source)).sum(0)  # [head, R, d]
        out = f"L{group.layer}.attn.out"
        whole = of.trace(inputs, want=out)[out][0, -reads:]
        assert gap(vectors.sum(0), whole) < CLOSE
        for head in range(group.per_source):
            left = of.trace(inputs, want=out, do=Zero(f"L{group.layer}.attn.z[{head}]"))[out][0, -reads:]
            assert gap(vectors[head], whole - left) < 1e-4


def test_heads_of_an_ordinary_model_have_no_gates() -> None:
    assert not any(layer.gated for layer in model("LlamaForCausalLM").layers)


def test_flow_goes_through_gated_heads() -> None:
    of = model("AfmoeForCausalLM")
    assert all(layer.gated for layer in of.layers)
    assert flow(of, of.inputs(PROMPT), "proximity").error < 1e-4


# -- between layers ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["Qwen3VLForConditionalGeneration", "Granite4VisionForConditionalGeneration"])
def test_image_features_added_between_layers_are_told_apart(name: str) -> None:
    of, inputs = with_image(name)
    seen = [p for p, role in enumerate(inputs.roles[0]) if role == "image"]
    parts = take_apart(of, inputs, range(inputs.ids.shape[1]), "layer")
    added = [layer.inserted for layer in parts.layers if layer.inserted is not None]
    assert added
    words = [p for p in range(inputs.ids.shape[1]) if p not in seen]
    assert any(float(x[seen].abs().max()) > 1e-2 for x in added)
    assert all(float(x[words].abs().max()) == 0.0 for x in added)
    assert parts.identity_error < CLOSE
    answer = int(of(inputs)[0, -1].argmax())
    values = find_values(of, inputs, answer, None, 20, ["attn.z"])
    sums = totals(take_apart(of, inputs, values.positions, "layer"), values)
    assert sums.error < 1e-4
    assert sums.shared["image features between layers"] != 0.0


# -- what is attended to, and what is read ----------------------------------------------------------------------------
def test_keys_that_are_no_positions_of_the_prompt_are_refused() -> None:
    of, inputs = with_image("MllamaForConditionalGeneration")
    parts = take_apart(of, inputs, 1, "head-position")
    assert any("which are not the prompt's" in why for why in parts.missing.values())
    with pytest.raises(UnsupportedError, match="which are not the prompt's"):
        flow(of, inputs, "proximity")
    with pytest.raises(UnsupportedError, match="queries by 16 keys for 13 positions"):
        head_kinds(model("DeepseekV4ForCausalLM"), [list(range(5, 18))])


def test_attention_over_an_encoders_states_is_labelled_by_number() -> None:
    of, inputs = with_image("T5Gemma2ForConditionalGeneration")
    found = attention_pattern(of, inputs)
    assert found.pattern.shape[-1] == len(found.labels["key"]) > len(found.labels["query"]) == inputs.ids.shape[1]


@pytest.mark.parametrize("name", ["VisionEncoderDecoderModel", "Pix2StructForConditionalGeneration"])
def test_a_decoders_tokens_are_the_prompt(name: str) -> None:
    built = tiny(name, IMAGE_TEXT)
    of, inputs = with_image(name)
    assert torch.equal(inputs.ids, built.inputs["decoder_input_ids"])
    assert "decoder_input_ids" in inputs.kwargs(of.device)
    with torch.no_grad():
        plain = built.hf(**built.inputs, use_cache=False).logits
    assert gap(of.trace(inputs, want="L0.resid_post").logits, plain) == 0.0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Blip2ForConditionalGeneration", "takes no prompt without 'pixel_values'"),
        ("Pix2StructForConditionalGeneration", "refused it: You have to specify flattened_patches"),
    ],
)
def test_a_prompt_that_a_model_does_not_take_alone_is_refused(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        model(name, IMAGE_TEXT)(torch.tensor([PROMPT]))


def test_an_error_of_an_intervention_is_not_the_models() -> None:
    from cutaway.core.intervention import Apply

    def broken(x: torch.Tensor, where: object) -> torch.Tensor:
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$") as caught:
        model("LlamaForCausalLM").trace(PROMPT, do=Apply("L0.resid_post", broken))
    assert not isinstance(caught.value, CutawayError)


# -- methods ----------------------------------------------------------------------------------------------------------
def test_a_neuron_that_is_off_is_refused() -> None:
    of = model("OPTForCausalLM")  # rectified
    act = of.trace(PROMPT, want="L2.mlp.act")["L2.mlp.act"][0, -1]
    off = int((act == 0).nonzero()[0])
    with pytest.raises(ParameterError, match=rf"L2.mlp.act\[{off}\] is off at the last position"):
        neuron_sources(of, PROMPT, neuron=f"L2.mlp.act[{off}]", draws=0)
    on = int(act.argmax())
    assert neuron_sources(of, PROMPT, neuron=f"L2.mlp.act[{on}]", draws=0).check.holds  # type: ignore[union-attr]


def test_an_expert_that_is_not_routed_to_is_named() -> None:
    of = model("MixtralForCausalLM")
    gate = of.trace(PROMPT, want="L2.expert.gate")["L2.expert.gate"][0, -1]
    idle = int((gate == 0).nonzero()[0])
    with pytest.raises(UnsupportedError, match="the last position is not sent to it"):
        neuron_sources(of, PROMPT, neuron=f"L2.expert.act[{idle}/3]", draws=0)


def test_a_chain_of_neurons_that_are_not_understood_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"L0.mlp.act, L1.mlp.act are left out: its activations are not"):
        neuron_chain(model("BitNetForCausalLM"), PROMPT, sites="L0.mlp.act[0-1], L1.mlp.act[0-1]", draws=0)


def test_paths_through_a_layer_with_an_indexer_run_whole_layers() -> None:
    found = path_patching(
        model("DeepseekV32ForCausalLM"), "#70 #71 #72 #73", "#60 #90 #92 #93", "L2.attn.v",
        metric="logit_diff: #11, #22", draws=0,
    )  # fmt: skip
    assert any("takes whole prompts alone" in note for note in found.notes)
    assert found.check.holds  # type: ignore[union-attr]


# -- what is understood in part ---------------------------------------------------------------------------------------
def test_a_module_between_layers_that_reads_the_stream_is_refused() -> None:
    of, inputs = with_image("IdeficsForVisionText2Text")
    with pytest.raises(
        UnsupportedError, match=r"model\.gated_cross_attn_layers\.\d+ adds to the stream in front of it"
    ):
        take_apart(of, inputs, 1, "layer")


def test_a_norm_inside_the_activation_is_no_function_of_one_neuron() -> None:
    of, inputs = with_image("Kosmos2ForConditionalGeneration")
    with pytest.raises(UnsupportedError, match="takes all neurons at once"):
        neuron_sources(of, inputs, neuron="L1.mlp.act[3]", draws=0)


def test_logits_of_other_positions_are_refused() -> None:
    of, inputs = with_image("PI0ForConditionalGeneration")
    with pytest.raises(UnsupportedError, match="do not stand for the positions"):
        of(inputs)


def test_attention_that_is_scaled_afterwards_has_no_pattern_to_show() -> None:
    with pytest.raises(UnsupportedError, match="it is scaled afterwards"):
        attention_pattern(model("GraniteSWAForCausalLM"), PROMPT)


def test_random_tokens_are_those_that_are_scored() -> None:
    of, _ = with_image("Molmo2ForConditionalGeneration")
    assert of.encoder.vocabulary_size > max(plain_ids(of)) + 1
    assert head_kinds(of, count=2, length=6, tokens=20, draws=0).check.holds  # type: ignore[union-attr]


def test_a_model_with_several_heads_is_patched_by_attribution() -> None:
    found = attribution_patching(
        model("MusicgenForCausalLM"), "#5 #9 #6 #7", "#5 #4 #6 #7", metric="logit_diff: #11, #22", draws=0
    )
    assert found.check.holds  # type: ignore[union-attr]
