"""Gradients in one pass against those of whole logits, and what a branch reads against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cutaway.core.errors import CutawayError
from cutaway.core.intervention import Add, Apply, Set
from cutaway.core.metric import Metric
from cutaway.core.site import Site
from cutaway.engine.gradients import differentiable
from tests.architectures import ARCHITECTURES, double, fresh, gap, inputs, model
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


@pytest.mark.parametrize("name", ["dense", "grouped-query", "parallel", "sliding-softcap", "no-interface", "post-norm"])
def test_what_a_branch_reads_is_what_changes_when_it_alone_reads_something_else(name: str) -> None:
    of, given = double(name), inputs(name)
    layer = of.layers[1]
    want = sites(name, "resid_pre", "resid_mid", *QUERIES, "mlp.in", "mlp.out")
    direction = torch.randn(1, given.ids.shape[1], layer.d_model, generator=torch.Generator().manual_seed(0)).double()
    with differentiable(of, given, want, branches=True) as run:
        grads = run.gradients(DIFFERENCE)
        pulled = {s: run.pull(s, g) for s, g in grads.items() if s.layer == 1 and not s.kind.startswith("resid")}
    start = {kind: "resid_pre" if layer.parallel or kind in QUERIES else "resid_mid" for kind in (*QUERIES, "mlp.in")}
    for site, gradient in pulled.items():

        def value(step: float, head: int | None, site: Site = site) -> Tensor:
            moved = Add(f"L1.{start.get(site.kind, start['mlp.in'])}", step * direction)
            read = of.trace(given, want=site, do=moved)[site]
            if head is None:
                logits = of.trace(given, do=Set(site, read)).logits
            else:
                logits = of.trace(given, do=Set(site.at(index=head), read[:, :, head : head + 1])).logits
            assert logits is not None
            return DIFFERENCE(logits, given)[0]

        step = 1e-2  # Llama's norm rounds to float32 in any precision
        for head in range(gradient.shape[2]) if site.kind in QUERIES else (None,):
            measured = float(value(step, head) - value(-step, head)) / (2 * step)
            part = gradient if head is None else gradient[:, :, head]
            assert float((part * direction).sum()) == pytest.approx(measured, rel=1e-3, abs=1e-5), (site, head)


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


def test_what_cannot_be_asked_says_why() -> None:
    of = model("dense")
    given = of.inputs([[5, 6, 7]])
    with differentiable(of, given, "L0.attn.q, L0.attn.z, L0.resid_mid") as run:
        grads = run.gradients(DIFFERENCE)
        with pytest.raises(CutawayError, match="branches=True"):
            run.pull(Site.parse("L0.attn.q"), grads[Site.parse("L0.attn.q")])
    with differentiable(of, given, "L0.attn.q, L0.attn.z", branches=True) as run:
        grads = run.gradients(DIFFERENCE)
        with pytest.raises(CutawayError, match=r"L0\.resid_pre' was not wanted"):
            run.pull(Site.parse("L0.attn.q"), grads[Site.parse("L0.attn.q")])
        with pytest.raises(CutawayError, match="there is none"):
            run.pull(Site.parse("L0.attn.z"), grads[Site.parse("L0.attn.z")])
