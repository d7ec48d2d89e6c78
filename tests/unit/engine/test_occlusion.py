"""Emptied image positions hold nothing of the image any more, wherever the model adds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cutaway.core.intervention import Set
from cutaway.core.metric import Metric
from cutaway.engine.occlusion import Occlusion
from cutaway.models.load import load
from tests.unit.models.vlm_folders import save


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_all_positions_emptied_leave_no_trace_of_the_image(name: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    model, values = load(tmp_path), []
    for seed in (0, 1):
        noise = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        inputs = model.inputs("what is here", Image.fromarray(noise))
        seen = [p for p, role in enumerate(inputs.roles[0]) if role == "image"]
        empty = Occlusion(model, inputs, seen, "zero", Metric("logprob", (11,)))
        found, base, how = empty([seen, seen[:1]])
        assert how == "replay"
        assert float(base) != pytest.approx(float(found[0]), abs=1e-6)
        values.append(found)
    assert float(values[0][0]) == pytest.approx(float(values[1][0]), abs=1e-5)
    assert float(values[0][1]) != pytest.approx(float(values[1][1]), abs=1e-5)


@torch.no_grad()
def test_features_that_are_added_later_are_emptied_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the model itself, made to add the mean of its later features."""
    save("qwen3_vl", tmp_path)
    model = load(tmp_path)
    inputs = model.inputs("what is here", Image.effect_noise((64, 64), 80).convert("RGB"))
    seen = [p for p, role in enumerate(inputs.roles[0]) if role == "image"]
    metric = Metric("logprob", (11,))
    (found,), _, _ = Occlusion(model, inputs, seen, "mean", metric)([seen])
    mean = model.trace(inputs, want="L0.resid_pre")["L0.resid_pre"][0, seen].mean(0)
    first = Set(f"L0.resid_pre@{seen[0]}-{seen[-1]}", mean)

    def run() -> float:
        logits = model.trace(inputs, do=first).logits
        assert logits is not None
        return float(metric(logits, inputs)[0])

    alone = run()
    language: Any = model.hf.model.language_model
    adds = language._deepstack_process
    averaged = lambda x, mask, features: adds(x, mask, features.mean(0, keepdim=True).expand_as(features))  # noqa: E731
    monkeypatch.setattr(language, "_deepstack_process", averaged)
    assert float(found) == pytest.approx(run(), abs=1e-4)
    assert float(found) != pytest.approx(alone, abs=1e-3)


@torch.no_grad()
def test_the_mean_is_that_of_the_positions(tmp_path: Path) -> None:
    save("llava", tmp_path)
    model = load(tmp_path)
    inputs = model.inputs("what is here", Image.effect_noise((32, 32), 80))
    seen = [p for p, role in enumerate(inputs.roles[0]) if role == "image"]
    mean = model.trace(inputs, want="L0.resid_pre")["L0.resid_pre"][0, seen].mean(0)
    metric = Metric("logit_diff", (11, 22))
    (found,), base, _ = Occlusion(model, inputs, seen, "mean", metric)([[seen[5], seen[2]]])
    logits = model.trace(inputs, do=[Set(f"L0.resid_pre@{seen[n]}", mean) for n in (2, 5)]).logits
    assert logits is not None
    assert float(found) == pytest.approx(float(metric(logits, inputs)[0]), abs=1e-5)
    assert float(base) == pytest.approx(float(metric(model(inputs), inputs)[0]), abs=1e-5)
