"""Causal tracing where it is known which state carries the subject on, and against runs written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cutaway import catalog
from cutaway.core.errors import InputError, MismatchError, ParameterError, TokenError
from cutaway.models.load import load
from cutaway.ops.spans import find
from cutaway.results import Grid
from tests.architectures import inputs, model

PROMPT, SUBJECT = [70, 71, 72, 73, 74], "#71 #72"


def traced(of: Any, **params: Any) -> Grid:
    given = {"prompt": PROMPT, "subject": SUBJECT, "metric": "logit_diff: #11, #22", **params}
    found = catalog.run("causal_trace", of, **given)
    assert isinstance(found, Grid)
    assert found.check is not None
    assert found.check.holds, str(found.check)
    return found


def test_the_state_that_carries_the_letter_before_is_the_one() -> None:
    """Noise on the first "k": a head of layer 0 tells the next word of it, a head of layer 1 brings that to the end."""
    of = load("circuit-induction")
    given = {"prompt": "f m d k b i k", "subject": "k", "metric": "logit_diff: b, i", "noise": 10.0, "draws": 8}
    states, attention, mlps = (traced(of, restore=what, **given) for what in ("states", "attention", "mlp"))
    word = states.labels["position"].index("b")
    assert states.labels["position"][word - 1] == "k"
    for found in (states, attention):
        mean = found.values[0]
        assert mean[0, word] == pytest.approx(1, abs=1e-3)
        assert mean[1, -1] == pytest.approx(1, abs=1e-3)
        rest = mean.copy()
        rest[0, word] = rest[1, -1] = 0
        assert abs(rest).max() < 0.1
        assert found.proof is not None
        assert found.proof.holds, str(found.proof)
    assert abs(mlps.values[0]).max() < 1e-3
    assert states.notes[2].endswith("how: replay")


def test_facts_of_a_person_are_read_at_the_end_of_the_name_and_then_at_the_end_of_the_prompt() -> None:
    found = catalog.run("causal_trace", load("town"), prompt="Ada Reed lives in", subject="Ada Reed", restore="states")
    mean = found.values[0]
    assert found.labels["position"][mean[0].argmax()].strip() == "Reed"
    assert [found.labels["position"][row.argmax()].strip() for row in mean[1:]] == ["in"] * (len(mean) - 1)
    assert mean[-1, -1] == pytest.approx(1, abs=1e-3)
    assert found.proof.holds, str(found.proof)


@pytest.mark.parametrize("restore", ["states", "mlp"])
def test_cells_are_what_hooks_written_by_hand_measure(restore: str) -> None:
    of, samples, window = model("grouped-query"), 3, 1 if restore == "states" else 2
    found = traced(of, restore=restore, window=window, samples=samples, noise=2.0, normalise=False, seed=5)
    hf = of.hf
    ids = torch.tensor([PROMPT])
    rows = hf.get_input_embeddings()(ids)[0, 1:3].detach()
    drawn = torch.randn((samples, 2, rows.shape[1]), generator=torch.Generator().manual_seed(5)) * 2 * rows.std()
    paths = [f"model.layers.{i}" + (".mlp" if restore == "mlp" else "") for i in range(3)]
    clean: dict[str, Tensor] = {}

    def run(noise: Tensor | None, restored: list[str], position: int) -> float:
        handles = []
        if noise is not None:

            def drown(m: Any, a: Any, out: Tensor) -> Tensor:
                new = out.clone()
                new[0, 1:3] += noise
                return new

            handles.append(hf.get_input_embeddings().register_forward_hook(drown))
        for path in paths:

            def after(m: Any, a: Any, out: Any, path: str = path) -> Any:
                x = out if isinstance(out, Tensor) else out[0]
                if noise is None:
                    clean[path] = x.clone()
                if path not in restored:
                    return None
                new = x.clone()
                new[0, position] = clean[path][0, position]
                return new if isinstance(out, Tensor) else (new, *out[1:])

            handles.append(hf.get_submodule(path).register_forward_hook(after))
        with torch.no_grad():
            logits = hf(input_ids=ids, use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        return float(logits[11] - logits[22])

    run(None, [], 0)
    for layer in range(3):
        low = layer - window // 2
        span = [path for i, path in enumerate(paths) if low <= i < low + window]
        for position in range(len(PROMPT)):
            back = torch.tensor([run(n, span, position) - run(n, [], 0) for n in drawn])
            assert found.values[0, layer, position] == pytest.approx(float(back.mean()), abs=1e-4)
            assert found.values[1, layer, position] == pytest.approx(float(back.std()), abs=1e-4)


@pytest.mark.parametrize("name", ["no-interface", "sinks", "post-norm", "experts", "parallel"])
def test_last_states_bring_everything_back_on_any_architecture(name: str) -> None:
    found = traced(model(name), samples=2)
    np.testing.assert_allclose(found.values[0, -1], [0, 0, 0, 0, 1], atol=1e-3)


def test_an_image_in_the_prompt() -> None:
    given = inputs("llava")
    token = next(t for t, role in zip(given.tokens[0], given.roles[0], strict=True) if role == "text")
    found = traced(model("llava"), prompt=given, subject=token, samples=2)
    assert found.values[0, -1, -1] == pytest.approx(1, abs=1e-3)


def test_noise_that_raises_the_metric_is_said() -> None:
    of = model("dense")
    least = int(of([PROMPT])[0, -1].argmin())
    raised = traced(of, metric=f"prob: #{least}", noise=20.0)
    assert any("it raises it" in note for note in raised.notes)
    lost = traced(of, metric=f"prob: #{int(of([PROMPT])[0, -1].argmax())}", noise=20.0)
    assert not any("it raises it" in note for note in lost.notes)


def test_the_same_seed_draws_the_same_noise() -> None:
    of = model("grouped-query")
    one, same, other = (traced(of, samples=2, seed=seed, draws=0).values for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert abs(one - other).max() > 1e-4


def test_words_are_found_as_whole_tokens() -> None:
    given = load("town").inputs("Ada Reed lives in")
    assert [given.tokens[0][p].strip() for p in find(given, "Ada  Reed", "subject")] == ["Ada", "Reed"]
    for words in ("Ree", "", "Ada lives"):
        with pytest.raises(InputError, match=r"subject '.*': it is not one or several whole tokens of the prompt"):
            find(given, words, "subject")


def test_a_subject_may_be_named_by_ids_where_there_is_a_tokenizer() -> None:
    of = load("town")
    words = {"prompt": "Ada Reed lives in", "metric": None, "samples": 2, "draws": 0}
    ids = of.inputs("Ada Reed lives in").ids[0, find(of.inputs("Ada Reed lives in"), "Ada Reed", "subject")].tolist()
    by_words, by_ids, by_text = (
        traced(of, subject=subject, **words) for subject in ("Ada Reed", ids, " ".join(f"#{i}" for i in ids))
    )
    np.testing.assert_array_equal(by_ids.values, by_words.values)
    np.testing.assert_array_equal(by_text.values, by_words.values)
    assert by_text.made_by is not None
    assert by_text.made_by.params["subject"] == " ".join(f"#{i}" for i in ids)
    with pytest.raises(InputError, match=rf"subject '#{ids[1]} #{ids[0]}': it is not one or several whole tokens"):
        traced(of, subject=ids[::-1], **words)


SEVERAL: dict[str, Any] = {"prompt": [[70, 71, 72, 73, 74], [70, 71, 72, 8, 9]], "samples": 3, "noise": 2.0}


@pytest.mark.parametrize("name", ["grouped-query", "no-interface"])
@pytest.mark.parametrize("normalise", [True, False])
def test_several_prompts_give_the_mean_of_each_alone(normalise: bool, name: str) -> None:
    of = model(name)
    several = traced(of, **SEVERAL, normalise=normalise)
    each = [traced(of, **{**SEVERAL, "prompt": one}, normalise=False) for one in SEVERAL["prompt"]]
    shares = [traced(of, **{**SEVERAL, "prompt": one}) for one in SEVERAL["prompt"]]
    taken = [raw.values[0, -1, -1] / share.values[0, -1, -1] for raw, share in zip(each, shares, strict=True)]
    unit = np.mean(taken) if normalise else 1.0
    values = np.stack([grid.values for grid in each]).mean(0)
    np.testing.assert_allclose(several.values[0], values[0] / unit, atol=1e-4)
    np.testing.assert_allclose(several.values[1], values[1] / abs(unit), atol=1e-4)
    assert several.standard_error.shape == several.values.shape
    if not normalise:
        error = abs(each[0].values - each[1].values) / 2  # the standard error of two
        np.testing.assert_allclose(several.standard_error, error, atol=1e-5)
    assert several.title.endswith("mean over 2 prompts")
    narrow = traced(of, **SEVERAL, normalise=normalise, budget=1)
    assert narrow.same_as(several, rtol=1e-3, atol=1e-4).lines == ()


def test_several_prompts_may_have_their_own_subject_answer_and_length() -> None:
    of = model("grouped-query")
    given = {**SEVERAL, "prompt": [[70, 71, 72, 73], [5, 9, 71, 6, 8]], "normalise": False, "positions": "-3--1"}
    several = traced(of, **given, subject='["#71 #72", "#9"]', metric=None, answers=[11, 12], rivals=[22, 23])
    assert several.labels["position"] == ("#71", -2, -1)
    each = [
        traced(of, **{**given, "prompt": prompt}, subject=subject, metric=f"logit_diff: #{a}, #{b}")
        for prompt, subject, a, b in zip(given["prompt"], ("#71 #72", [9]), (11, 12), (22, 23), strict=True)
    ]
    np.testing.assert_allclose(several.values, np.mean([grid.values for grid in each], axis=0), atol=1e-5)
    own = traced(of, **given, subject="#71", metric=None)
    assert own.measure == "change of p(answer)"


def test_over_many_prompts_the_word_behind_the_subject_carries_it() -> None:
    """A letter is said again at the end: what came behind it before is the answer, wherever that was."""
    letters, draw = "a b c d e f g h i j k m n o p".split(), np.random.default_rng(0)
    rows = [draw.permutation(letters)[:6].tolist() for _ in range(20)]
    found = traced(
        load("circuit-induction"),
        prompt=[" ".join([*row, row[2]]) for row in rows],
        subject=[row[2] for row in rows],
        metric=None,
        answers=[f" {row[3]}" for row in rows],
        rivals=[f" {row[4]}" for row in rows],
        noise=10.0,
        samples=3,
        draws=8,
    )
    mean, places = found.values[0], found.labels["position"]
    word = 3 + (places[0] == "<s>")
    assert mean[0, word] == pytest.approx(1, abs=0.02)
    assert mean[1, -1] == pytest.approx(1, abs=0.02)
    rest = mean.copy()
    rest[0, word] = rest[1, -1] = 0
    assert abs(rest).max() < 0.4  # the subject itself, which the noise makes loud
    assert found.proof is not None
    assert found.proof.holds, str(found.proof)


@pytest.mark.parametrize(
    ("params", "error", "sentence"),
    [
        ({"subject": "#99"}, InputError, r"which are \['#70', '#71', '#72', '#73', '#74'\]"),
        ({"subject": [98, 99]}, InputError, r"subject '#98 #99': .* which are \['#70', '#71', '#72', '#73', '#74'\]"),
        ({**SEVERAL, "subject": '["#71", "#74"]'}, InputError, "subject of prompt 1 '#74': it is not one or several"),
        ({**SEVERAL, "subject": '["#71", "#71", "#9"]'}, MismatchError, "3 for 2 prompts; give one for all prompts"),
        ({"prompt": [PROMPT, [71, 72]]}, MismatchError, "prompt 0 has 5 of them and prompt 1 has 2"),
        ({**SEVERAL, "metric": None, "answers": [1]}, MismatchError, "answers: 1 tokens for 2 prompts"),
        ({"answers": [1]}, ParameterError, "they are given together"),
        ({"subject": ["k", [71]]}, ParameterError, "it mixes texts and token ids"),
        ({"noise": 1e-12}, ParameterError, "it takes nothing of logit_diff"),
        ({"metric": "prob: #999999"}, TokenError, "999999"),
        ({"noise": 0.0}, ParameterError, "greater than 0"),
        ({"restore": "resid"}, ParameterError, "'states'"),
        ({"layers": "9"}, LookupError, "layer 9 is not there"),
        ({"draws": 1}, ParameterError, "give at least 5, or 0"),
    ],
)
def test_what_cannot_be_traced_says_why(params: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        traced(model("grouped-query"), **params)
