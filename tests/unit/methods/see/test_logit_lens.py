"""The logit lens against norms and heads written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cutaway import catalog
from cutaway.core.errors import SiteRangeError, TokenError
from cutaway.results import Readout
from tests.architectures import PROMPT, TEXT, gap, inputs, model
from tests.equivalence.reference import _layer_norm, _rms_norm


def lens(name: str, **params: Any) -> Readout:
    found = catalog.run("logit_lens", model(name), **{"prompt": PROMPT, **params})
    assert isinstance(found, Readout)
    return found


def by_hand(name: str, states: Tensor) -> Tensor:
    """Log-probabilities of residual states."""
    hf: Any = model(name).hf
    if name == "dense":
        return (_layer_norm(states, hf.transformer.ln_f) @ hf.lm_head.weight.T).log_softmax(-1)
    return (_rms_norm(states, hf.model.norm) @ hf.lm_head.weight.T).log_softmax(-1)


@pytest.mark.parametrize("name", ["dense", "grouped-query"])
def test_every_cell_is_the_norm_and_the_head_of_that_state(name: str) -> None:
    found = lens(name, k=4, target="#11")
    states = model(name).trace([PROMPT], want="L0.resid_pre, L*.resid_post")
    for row, state in enumerate(states.values()):
        logp = by_hand(name, state[0]).detach()
        best = logp.topk(4)
        assert gap(torch.tensor(found.log_probs[row]), best.values) < 1e-5
        assert torch.equal(torch.tensor(found.ids[row]), best.indices)
        assert found.target_log_prob is not None
        assert gap(torch.tensor(found.target_log_prob[row]), logp[:, 11]) < 1e-5
        assert found.target_rank is not None
        assert found.target_rank[row].tolist() == (logp > logp[:, 11:12]).sum(-1).tolist()
    assert found.labels["layer"] == ("embed", 0, 1, 2)
    assert found.tokens[0, 0, 0] == f"#{found.ids[0, 0, 0]}"


@pytest.mark.parametrize("name", TEXT)
def test_the_last_row_is_what_the_model_says(name: str) -> None:
    found = lens(name, k=1)
    logp = model(name)([PROMPT])[0].log_softmax(-1)
    assert found.ids[-1, :, 0].tolist() == logp.argmax(-1).tolist()
    assert gap(torch.tensor(found.log_probs[-1, :, 0]), logp.max(-1).values) < 1e-4
    assert found.check is not None
    assert found.check.holds


def test_layers_and_positions_are_parts_of_the_whole() -> None:
    whole, part = lens("grouped-query"), lens("grouped-query", layers="1+-1", positions="-1+0-1")
    assert part.labels["layer"] == ("embed", 1, 2)
    assert (part.ids == whole.ids[[0, 2, 3]][:, [8, 0, 1]]).all()


@pytest.mark.parametrize("name", ["llava", "qwen-vl"])
def test_image_positions_are_read_like_any_other(name: str) -> None:
    given = inputs(name)
    found = lens(name, prompt=given, positions="image")
    count = given.roles[0].count("image")
    assert found.ids.shape[:2] == (4, count)
    whole = lens(name, prompt=given)
    at = [p for p, role in enumerate(given.roles[0]) if role == "image"]
    assert (found.log_probs == whole.log_probs[:, at]).all()


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(SiteRangeError, match="layer 3 is not there: the valid layers are 0-2"):
        lens("grouped-query", layers="3")
    with pytest.raises(SiteRangeError, match="position 9"):
        lens("grouped-query", positions="9")
    with pytest.raises(TokenError, match=r"#500.*0-127"):
        lens("grouped-query", target="#500")
