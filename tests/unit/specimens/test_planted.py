"""The numbers on the planted cards, derived by arithmetic, are what the models do."""

import pytest
import torch

from cutaway import specimens
from cutaway.specimens.exam import load_plain
from recipes import planted

FAMILIES = planted.FAMILIES
PROMPTS = [(s, r) for s in planted.SUBJECTS for r in planted.RELATIONS]
PARTS = {
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
    "llama": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "gemma": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
}
HEAD_CHANNELS = slice(planted.HEAD * 16, (planted.HEAD + 1) * 16)


@pytest.fixture(scope="module", params=FAMILIES)
def planted_model(request):
    name = f"planted-{request.param}"
    model, tokenizer = load_plain(specimens.path(name), "causal-lm")
    return request.param, model, tokenizer


def run(model, tokenizer, prompt, family, change=None):
    """Last logits in double precision, and the inputs of every output projection, seen or changed on the way."""
    seen, handles = {}, []
    for kind, pattern in zip(("head", "neuron"), PARTS[family], strict=True):
        for layer in range(3):

            def hook(module, args, key=(kind, layer)):
                x = args[0].clone()
                if change:
                    change(key, x)
                seen[key] = x[0].detach()
                return (x,)

            handles.append(model.get_submodule(pattern.format(layer)).register_forward_pre_hook(hook))
    with torch.no_grad():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].double()
    for handle in handles:
        handle.remove()
    return logits, seen


def index(site):
    return int(site.split("[")[1].rstrip("]"))


@pytest.mark.parametrize(("subject", "relation"), PROMPTS)
def test_arithmetic_predicts_every_logit(planted_model, subject, relation):
    family, model, tokenizer = planted_model
    truth = planted.Truth(family, subject, relation)
    logits, _ = run(model, tokenizer, f"{subject} {relation}", family)
    expected = truth.logits(truth.final)
    torch.testing.assert_close(logits, torch.tensor([expected[w] for w in planted.WORDS]).double(), atol=2e-5, rtol=0)
    assert tokenizer.decode(logits.argmax()) == truth.answer


def test_the_card_says_what_the_recipe_derives(planted_model):
    family, _, _ = planted_model
    derived = [planted.Truth(family, s, r).as_dict() for s, r in PROMPTS]
    assert specimens.card(f"planted-{family}").truths["prompts"] == derived


def test_planted_coefficients_and_importance(planted_model):
    family, model, tokenizer = planted_model
    for truth in specimens.card(f"planted-{family}").truths["prompts"]:
        logits, seen = run(model, tokenizer, truth["prompt"], family)
        query, value = index(truth["query_neuron"]), index(truth["value_neuron"])
        answer = tokenizer.convert_tokens_to_ids(truth["answer"])
        assert seen["neuron", 0][1, query].item() == pytest.approx(truth["query_neuron_coefficient"], abs=1e-5)
        assert seen["neuron", 2][-1, value].item() == pytest.approx(truth["value_neuron_coefficient"], abs=1e-5)
        assert logits.log_softmax(-1)[answer].item() == pytest.approx(truth["log_probability"], abs=1e-5)
        assert truth["head_importance"] > 0.3
        assert truth["value_neuron_importance"] > 0.3


def test_each_planted_part_is_necessary_and_others_are_not(planted_model):
    family, model, tokenizer = planted_model
    prompt, other = "Ada plays", planted.value_neuron("Bea", "plays")
    truth = planted.Truth(family, "Ada", "plays")
    query, value = planted.query_neuron("Ada"), planted.value_neuron("Ada", "plays")
    answer = tokenizer.convert_tokens_to_ids(truth.answer)
    rival = tokenizer.convert_tokens_to_ids("red")

    def margin(kind, layer, channels):
        def change(key, x):
            if key == (kind, layer):
                x[..., channels] = 0

        logits, _ = run(model, tokenizer, prompt, family, change)
        return (logits[answer] - logits[rival]).item()

    whole = margin("none", 0, 0)
    assert margin("head", 1, HEAD_CHANNELS) < 0.2 * whole
    assert margin("neuron", 0, query) < 0.2 * whole
    assert margin("neuron", 2, value) < 0.02 * whole
    assert margin("neuron", 2, other) == pytest.approx(whole, rel=0.05)
    assert margin("head", 1, slice(0, 32)) == pytest.approx(whole, rel=1e-5)
