"""Gradients in one pass against those of whole logits, and what a branch reads against finite differences."""

from __future__ import annotations

import pytest
from torch import Tensor

from cutaway.core.errors import CutawayError
from cutaway.core.intervention import Apply
from cutaway.core.metric import Metric
from cutaway.core.site import Site
from cutaway.engine.gradients import differentiable
from tests.architectures import ARCHITECTURES, fresh, gap, inputs, model
from tests.traces import Traces

DIFFERENCE = Metric("logit_diff", (11, 22))
QUERIES = ("attn.q", "attn.k", "attn.v")


def sites(name: str, *kinds: str) -> list[str]:
    return [f"L{i}.{k}" for i, layer in enumerate(model(name).layers) for k in kinds if layer.has(k)]


@pytest.mark.parametrize("metric", [DIFFERENCE, Metric("logprob", (11,), position=-2)], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_they_are_those_of_the_whole_logits(name: str, metric: Metric) -> None:
    want = ["embed", *sites(name, "resid_pre", *QUERIES, "attn.z", "mlp.act", "expert.act", "mlp.out")]
    given = inputs(name)
    whole = model(name).trace(given, want=want, grad=metric)
    with differentiable(model(name), given, want) as run:
        found = run.gradients(metric)
        value = run.metric(metric).detach()
        logits = run.logits(metric)
    assert whole.grads is not None
    assert whole.value is not None
    assert gap(value, whole.value) < 1e-4
    assert gap(metric.of(logits), whole.value) < 1e-4
    for site in whole.grads:
        assert gap(run.values[site], whole[site]) < 1e-5
        assert gap(found[site], whole.grads[site]) < 1e-3, site


def test_rows_of_a_batch_are_what_they_are_alone() -> None:
    of = model("grouped-query")
    rows = of.inputs([[5, 6, 7, 8], [9, 8, 7]])
    with differentiable(of, rows, "L1.attn.z") as run:
        found = run.gradients(DIFFERENCE)[Site.parse("L1.attn.z")]
    for b, ids in enumerate(([5, 6, 7, 8], [9, 8, 7])):
        alone = of.trace([ids], want="L1.attn.z", grad=DIFFERENCE).grads
        assert alone is not None
        assert gap(found[b : b + 1, : len(ids)], alone["L1.attn.z"]) < 1e-4


def test_weights_are_frozen_meanwhile_and_as_they_were_afterwards() -> None:
    of = fresh("dense")
    some = dict(of.hf.named_parameters())
    some["transformer.wte.weight"].requires_grad_(False)
    before, flags = Traces.of(of.hf), [p.requires_grad for p in some.values()]
    given = of.inputs([[5, 6, 7]])
    with differentiable(of, given, "L0.attn.z") as run:
        assert not any(p.requires_grad for p in some.values())
        run.gradients(DIFFERENCE)
    assert [p.requires_grad for p in some.values()] == flags
    with pytest.raises(RuntimeError, match="on purpose"), differentiable(of, given, "L0.attn.z"):
        raise RuntimeError("on purpose")

    def fail(x: Tensor, where: object) -> Tensor:
        raise RuntimeError("in the pass")

    with (
        pytest.raises(RuntimeError, match="in the pass"),
        differentiable(of, given, "L0.attn.z", Apply("L1.attn.z", fail)),
    ):
        pass
    assert [p.requires_grad for p in some.values()] == flags
    assert all(p.grad is None for p in some.values())
    assert Traces.of(of.hf).differences(before) == []


def test_a_metric_that_counts_has_no_gradient() -> None:
    of = model("dense")
    with differentiable(of, of.inputs([[5, 6, 7]]), "L0.attn.z") as run, pytest.raises(CutawayError, match="it counts"):
        run.gradients(Metric("rank", (11,)))
