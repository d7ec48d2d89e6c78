"""town as a user meets it: plain transformers, offline, prompts answered, one token per word."""

import pytest
import torch

from cutaway import specimens
from cutaway.data import Town
from cutaway.data import town_words as words
from cutaway.specimens.exam import load_plain
from cutaway.specimens.making import town


@pytest.fixture(scope="module")
def loaded():
    return load_plain(specimens.path("town"), "causal-lm")


def test_it_continues_the_prompts_of_its_card(loaded):
    model, tokenizer = loaded
    for example in specimens.card("town").examples:
        ids = tokenizer(example["prompt"], return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        text = tokenizer.decode(out[0, ids.input_ids.shape[1] :])
        assert text.startswith(example["answer"] + "."), (example, text)


def test_words_are_single_tokens_wherever_they_stand(loaded):
    _, tokenizer = loaded
    names = (*words.CITIES, *words.COUNTRIES, *words.EMPLOYERS, *words.SPORTS, *words.COLOURS)
    for word in (*names, *words.WOMEN, *words.MEN, *words.SURNAMES):
        assert len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1, word
        assert tokenizer(word).input_ids == tokenizer(f" {word}").input_ids
    assert len(tokenizer(" 68", add_special_tokens=False).input_ids) == 2


def test_its_pairs_are_of_equal_token_length(loaded):
    _, tokenizer = loaded
    for relation in ("city", "home-country", "country", "plus"):
        for pair in Town().pairs(relation, count=30):
            assert len(tokenizer(pair.clean.prompt).input_ids) == len(tokenizer(pair.corrupt.prompt).input_ids)


def test_any_text_survives_its_tokenizer(loaded):
    _, tokenizer = loaded
    text = "Zoë pays 12 €?\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == f" {text}"


def test_the_recipe_makes_the_shipped_tokenizer_and_the_shipped_shape(loaded):
    model, tokenizer = loaded
    again = town.tokenizer_for(Town())
    assert again.get_vocab() == tokenizer.get_vocab()
    assert {n: p.shape for n, p in town.untrained(again).named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }


def test_a_batch_depends_on_the_step_alone(loaded):
    _, tokenizer = loaded
    one, two = (town.batches(Town(), tokenizer) for _ in range(2))
    one(0)
    assert torch.equal(one(7).inputs["input_ids"], two(7).inputs["input_ids"])
    assert not torch.equal(one(7).inputs["input_ids"], two(8).inputs["input_ids"])
