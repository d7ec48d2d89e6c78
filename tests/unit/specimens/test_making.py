"""The training loop, the tokenizers and the wiring that specimens are made with."""

import itertools
import math

import pytest
import torch

from cutaway.core.errors import LoadError
from cutaway.data import Example
from cutaway.specimens.making import loop, plans, text, tokenizers
from recipes import build_all, wiring


def test_rate_warms_up_and_comes_down_to_its_floor():
    schedule = loop.Schedule(steps=100, rate=1.0, warmup=10, floor=0.1)
    rates = [schedule.rate_at(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_loss_weighs_targets():
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 2] = 5.0
    ids, weights = torch.tensor([[0, 1, 2]]), torch.tensor([[9.0, 1.0, 3.0]])
    sure = math.log(math.exp(5) + 3) - 5
    assert loop.weighted_loss(logits, ids, weights).item() == pytest.approx((math.log(4) + 3 * sure) / 4)


def test_norm_gains_and_biases_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    decayed, free = loop.optimizer_for(model, loop.Schedule(steps=1, rate=1.0)).param_groups
    assert [p.dim() for p in decayed["params"]] == [2]
    assert len(free["params"]) == 3
    assert free["weight_decay"] == 0


def test_curve_keeps_the_mean_and_the_last_step():
    log = [(i + 1, float(i)) for i in range(100)]
    points = loop.curve(log, points=10)
    assert [step for step, _ in points] == list(range(10, 101, 10))
    assert points[0][1] == pytest.approx(4.5)


def test_a_shortened_plan_keeps_its_proportions():
    made = plans.plan("labels")
    short = made.shortened(220)
    assert short.steps == 220
    assert [s.steps for _, s in short.stages] == [100, 120]


def test_an_unknown_plan_gets_the_nearest():
    with pytest.raises(LoadError, match="training 'labls': no recipe has that name; did you mean 'labels'"):
        plans.plan("labls")


def test_byte_pairs_make_every_word_one_token():
    tokenizer = tokenizers.byte_pair(["Ada lives in Alder.", "12 + 3 = 15."], special=["<image>"])
    assert tokenizer.tokenize("Ada lives") == ["ĠAda", "Ġlives"]
    assert tokenizer.tokenize("12 + 3") == ["Ġ1", "2", "Ġ+", "Ġ3"]
    assert tokenizer("Ada").input_ids == [
        tokenizer.bos_token_id,
        *tokenizer(" Ada", add_special_tokens=False).input_ids,
    ]
    assert len(tokenizer("<image>", add_special_tokens=False).input_ids) == 1


def test_an_answer_counts_when_all_of_it_is_greedy():
    tokenizer = tokenizers.word_level(["a", "b", "c"])

    class Echo(torch.nn.Module):
        """Predicts the token that it reads."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids):
            return type("Out", (), {"logits": torch.nn.functional.one_hot(input_ids, len(tokenizer)).float()})

    asked = [Example(prompt="a", answer=a, skill="", form="") for a in (" a a", " a b", " b")]
    assert text.correct(Echo(), tokenizer, asked, stop="") == [True, False, False]


def test_more_directions_than_width_are_refused():
    embeddings = {"<s>": {f"d{i}": 1.0 for i in range(9)}}
    plan = wiring.Blueprint(
        words=["<pad>", "<s>", "</s>"], embeddings=embeddings, layers=1, width=8, heads_per_layer=2, neurons_per_layer=4
    )
    with pytest.raises(ValueError, match="9 directions do not fit a width of 8"):
        wiring.build(plan, "gpt2")


def test_every_recipe_can_be_called():
    import importlib

    for name in build_all.RECIPES:
        assert callable(importlib.import_module(f"recipes.{name}").main)


def test_build_all_refuses_what_it_does_not_know():
    with pytest.raises(SystemExit, match=r"no recipe is called towm; there are planted"):
        build_all.main(["towm"])
