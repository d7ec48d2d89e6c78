"""Neurons found by what they mean behind a head: planted ones, the definition spelled out, and refusals."""

import pytest
import torch

from cutaway import specimens
from cutaway.core.errors import ParameterError, UnsupportedError
from cutaway.methods.locate import transformed_neurons as module
from cutaway.methods.locate.transformed_neurons import transformed_neurons
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.models.tiny import tiny
from recipes.planted import ANSWERS, SUBJECTS

IDS = [5, 9, 6, 7, 8]
WORDS = [11, 12, 13, 14]


@pytest.mark.parametrize("through", [None, "L1.attn.z"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_the_planted_query_neuron_means_the_answers_behind_the_planted_head(family, through):
    model = load(f"planted-{family}")
    for case in specimens.card(f"planted-{family}").truths["prompts"]:
        subject = SUBJECTS.index(case["prompt"].split()[0])
        words = [answers[subject] for answers in ANSWERS.values()]
        found = transformed_neurons(model, case["prompt"], words=words, through=through, top=2)
        assert list(found.items) == [case["query_neuron"]]  # no other raises any of the two
        assert found.scores.tolist() == [2.0]
        assert found.columns["through"][0] == (case["head"] if through else "L1.attn.out")
        assert set(found.columns["tokens"][0].split()[:2]) == set(words)
        assert found.check.holds
        assert found.proof.holds, str(found.proof)


@torch.no_grad()
@pytest.mark.parametrize("through", ["L1.attn.out", "L1.attn.z[3]"])
def test_counts_are_the_definition_spelled_out_in_any_blocks(through, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_OF_LOGITS", 1000)
    model = Model(tiny("LlamaForCausalLM").hf)
    found = transformed_neurons(model, IDS, words=WORDS, layers="0", through=through, top=20, k=1000, draws=0)
    first, last = model.hf.model.layers[1], model.hf.model.norm.weight
    value = first.self_attn.v_proj.weight.unflatten(0, (2, 16)).repeat_interleave(2, 0)  # two heads share values
    out = first.self_attn.o_proj.weight.unflatten(1, (4, 16))
    heads = range(4) if "out" in through else [3]
    moved = sum((out[:, h] @ value[h] for h in heads), torch.zeros(()))
    columns = model.weight("L0.mlp.act") * first.input_layernorm.weight
    z = (columns @ moved.T * last) @ model.hf.get_output_embeddings().weight.T
    counts = torch.isin(z.topk(20).indices, torch.tensor(WORDS)).sum(-1)
    expected = {f"L0.mlp.act[{i}]": float(n) for i, n in enumerate(counts) if n > 0}
    assert dict(zip(found.items, found.scores.tolist(), strict=True)) == expected
    assert (found.scores[:-1] >= found.scores[1:]).all()


@pytest.mark.parametrize("name", ["Gemma2ForCausalLM", "GPTNeoXForCausalLM", "MixtralForCausalLM", "FalconForCausalLM"])
def test_other_architectures_and_several_prompts(name):
    found = transformed_neurons(Model(tiny(name).hf), [IDS, IDS[:3]], words=WORDS, top=20, k=3)
    assert found.check.holds
    assert found.proof.n_draws == 5


def test_refusals():
    model = Model(tiny("LlamaForCausalLM").hf)
    with pytest.raises(ParameterError, match="half of all"):
        transformed_neurons(model, IDS, words=WORDS, top=10**6)
    with pytest.raises(ParameterError, match="the best of"):
        transformed_neurons(model, IDS, words=[11], top=5, least=2)
    with pytest.raises(ParameterError, match="not deeper"):
        transformed_neurons(model, IDS, words=WORDS, top=20, through="L0.attn.out")
    with pytest.raises(ParameterError, match=r"name attn\.out or attn\.z"):
        transformed_neurons(model, IDS, words=WORDS, top=20, through="L1.mlp.out")
    with pytest.raises(UnsupportedError, match="norms the sum"):
        transformed_neurons(Model(tiny("BartForCausalLM").hf), IDS, words=WORDS, top=20)
