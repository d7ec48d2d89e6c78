"""Causal tracing where it is known which state carries the subject on, and against runs written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cutaway import catalog
from cutaway.core.errors import InputError, ParameterError, TokenError
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


@pytest.mark.parametrize(
    ("params", "error", "sentence"),
    [
        ({"subject": "#99"}, InputError, r"which are \['#70', '#71', '#72', '#73', '#74'\]"),
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
