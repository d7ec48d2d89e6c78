"""Patching experts' neurons, against experts written out by hand, also where two runs are routed differently."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cutaway
from cutaway import catalog
from cutaway.core.errors import ParameterError, SiteMissingError
from cutaway.core.intervention import Add, Set, Zero
from cutaway.engine.estimate import estimate
from cutaway.engine.patching import Cells, Exchange
from cutaway.models.handle import Model
from cutaway.models.tiny import tiny
from cutaway.results import Grid
from tests import architectures
from tests.architectures import gap
from tests.traces import Traces

CLEAN, CORRUPT = [70, 71, 72, 73, 74, 75], [70, 90, 72, 93, 74, 75]
PAIR: dict[str, Any] = {"clean": CLEAN, "corrupt": CORRUPT, "metric": "logit_diff: #11, #22", "kind": "expert.act"}
MIXTURES = (
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "OlmoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "GptOssForCausalLM",
    "GraniteMoeForCausalLM",
)
PLAIN = ("MixtralForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM")
"""Those whose experts are ``down(act(gate) * up)``."""
KINDS = pytest.mark.parametrize("kind", ["expert.act", "expert.gate"])
EACH = pytest.mark.parametrize("name", MIXTURES)


def fresh(name: str) -> Model:
    """A model that a test may change."""
    return Model(tiny(name).hf, name=name)


model = cache(fresh)


def layers(of: Model) -> list[int]:
    """The layers that have experts."""
    return [i for i, layer in enumerate(of.layers) if layer.has("expert.act")]


def run(method: str, of: Model, **params: Any) -> Grid:
    found = catalog.run(method, of, **{**PAIR, "normalise": False, **params})
    assert isinstance(found, Grid)
    assert found.check is not None
    assert found.check.holds, str(found.check)
    return found


def changes(of: Model, **params: Any) -> np.ndarray:
    """What ``patch`` measures, as a change of the metric."""
    exact = run("patch", of, **params)
    return exact.values - exact.center


def written_out(
    module: Any, visit: Callable[[int, int, Tensor], Tensor], h: Tensor, index: Tensor, w: Tensor
) -> Tensor:
    """Experts, token by token; ``visit(token, expert, neurons)`` gives the neurons that go on."""
    out = torch.zeros_like(h)
    for t, chosen in enumerate(index.tolist()):
        for j, e in enumerate(chosen):
            gate, up = (module.gate_up_proj[e] @ h[t]).chunk(2)
            out[t] += w[t, j] * (module.down_proj[e] @ visit(t, e, module.act_fn(gate) * up))
    return out


@torch.no_grad()
def by_hand(of: Model, layer: int, ids: list[int], visit: Callable[[int, int, Tensor], Tensor]) -> float:
    """The metric with one layer's experts written out."""
    module: Any = of.hf.get_submodule(of.layers[layer].experts)
    module.forward = partial(written_out, module, visit)
    try:
        logits = of.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    finally:
        del module.forward
    return float(logits[11] - logits[22])


class Swapped:
    """The metric of one run with neurons of another in one layer, experts written out."""

    def __init__(self, of: Model, layer: int, gives: list[int], gets: list[int]) -> None:
        self.of, self.layer, self.gets = of, layer, gets
        self.seen: dict[tuple[int, int], Tensor] = {}
        by_hand(of, layer, gives, self.keep)

    def keep(self, token: int, expert: int, acts: Tensor) -> Tensor:
        self.seen[token, expert] = acts
        return acts

    def __call__(
        self, experts: Iterable[int] = range(4), places: Iterable[int] = range(6), part: slice = slice(None)
    ) -> float:
        def visit(token: int, expert: int, acts: Tensor) -> Tensor:
            if token in places and expert in experts:
                acts[part] = self.seen.get((token, expert), torch.zeros_like(acts))[part]
            return acts

        return by_hand(self.of, self.layer, self.gets, visit)


@pytest.mark.parametrize("direction", ["clean->corrupt", "corrupt->clean"])
@pytest.mark.parametrize("name", PLAIN)
def test_patch_is_a_loop_over_experts_written_out(name: str, direction: str) -> None:
    of = fresh(name)
    gives, gets = (CLEAN, CORRUPT) if direction == "clean->corrupt" else (CORRUPT, CLEAN)
    grids = {by: run("patch", of, by=by, direction=direction) for by in ("expert", "neurons", "position")}
    some = run("patch", of, by="neurons", blocks=8, positions="1-3", layers="1", direction=direction)
    width = of.layers[1].d_expert
    quarter, half = width // 4, width // 2
    assert grids["neurons"].labels["neurons"][3:5] == (f"0/{3 * quarter}-{width - 1}", f"1/0-{quarter - 1}")
    assert some.labels["neurons"][5] == f"2/{half}-{width - 1}"
    for row, layer in enumerate(layers(of)):
        swapped = Swapped(of, layer, gives, gets)
        for e in range(4):
            assert grids["expert"].values[row, e] == pytest.approx(swapped(experts=[e]), abs=2e-4)
        for p in (1, 3, 5):
            assert grids["position"].values[row, p] == pytest.approx(swapped(places=[p]), abs=2e-4)
        for i in (0, 6, 15):
            expected = swapped(experts=[i // 4], part=slice(i % 4 * quarter, i % 4 * quarter + quarter))
            assert grids["neurons"].values[row, i] == pytest.approx(expected, abs=2e-4)
    expected = Swapped(of, 1, gives, gets)(experts=[2], places=[1, 2, 3], part=slice(half, width))
    assert some.values[0, 5] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_a_weight_that_is_set_routes(name: str) -> None:
    """To experts that the token was not routed to, too, and patching weights is routing as the other run does."""
    of = fresh(name)
    gates = {i: of.trace([ids], want="L1.expert.gate")["L1.expert.gate"] for i, ids in enumerate((CLEAN, CORRUPT))}
    assert bool(((gates[0] != 0) & (gates[1] == 0)).any())
    module: Any = of.hf.get_submodule(of.layers[1].experts)

    def routed(h: Tensor, index: Tensor, w: Tensor, to: Tensor) -> Tensor:
        everyone = torch.arange(4).expand(len(h), -1)
        return written_out(module, lambda t, e, acts: acts, h, everyone, to)

    draw = torch.rand(1, 6, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.0, 1.0, 1.0])
    for value in (gates[0], draw):
        do = Set("L1.expert.gate", value)
        found = of.trace([CORRUPT], want="L1.expert.gate, L1.expert.act", do=do)
        module.forward = partial(routed, to=value[0])
        expected = of([CORRUPT])
        del module.forward
        assert gap(found.logits, expected) < 1e-5
        assert torch.equal(found["L1.expert.gate"], value)
        acts = found["L1.expert.act"]
        assert torch.equal(acts.any(-1), (value != 0) | (gates[1] != 0))  # what the router itself chose has run
        again = of.trace([CORRUPT], do=[do, Set("L1.expert.act", acts)]).logits
        assert gap(again, expected) < 1e-5
    every = run("patch", of, kind="expert.gate", by="position", layers="1")
    for p in (1, 3, 5):
        logits = of.trace([CORRUPT], do=Set(f"L1.expert.gate@{p}", gates[0][:, p : p + 1])).logits[0, -1]
        assert every.values[0, p] == pytest.approx(float(logits[11] - logits[22]), abs=1e-5)


@EACH
def test_sweeps_are_replayed(name: str) -> None:
    for kind in ("expert.act", "expert.gate"):
        assert "how: replay" in run("patch", model(name), kind=kind, by="expert").notes


@EACH
def test_reading_experts_and_taking_gradients_leaves_the_logits_as_they_are(name: str) -> None:
    of, want = model(name), "L*.expert.gate, L*.expert.act"
    bare = of([CLEAN])
    assert torch.equal(of.trace([CLEAN], want=want).logits, bare)
    assert torch.equal(of.trace([CLEAN], want=want, grad="logprob: #11").logits.detach(), bare)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_every_way_to_run_experts_shows_the_same(name: str, implementation: str) -> None:
    of, want = fresh(name), "L*.expert.gate, L*.expert.act"
    expected = model(name).trace([CLEAN], want=want, grad="logprob: #11")
    of.hf.set_experts_implementation(implementation)
    assert torch.equal(of.trace([CLEAN], want=want).logits, of([CLEAN]))
    found = of.trace([CLEAN], want=want, grad="logprob: #11")
    for site in expected:
        assert gap(found[site], expected[site]) < 1e-5, site
        assert gap(found.grads[site], expected.grads[site]) < 1e-4, site


@EACH
def test_gradients_are_finite_differences(name: str) -> None:
    of = fresh(name)
    of.hf.double().set_experts_implementation("batched_mm")  # the default has no float64 kernel
    of = Model(of.hf, name=name)
    given, metric = of.inputs([CLEAN]), of.metric("logit_diff: #11, #22")
    sites = of.expand("L*.expert.act, L*.expert.gate", given)
    found, draw = of.trace(given, want=sites, grad=metric), torch.Generator().manual_seed(0)
    for site in sites:
        x, g = found[site].detach(), found.grads[site]
        routed = found[str(site).replace("act", "gate")] != 0
        routed = routed[..., None].expand_as(x) if site.kind == "expert.act" else routed
        assert 0 < int(routed.sum()) < routed.numel()
        assert not g[~routed].any()
        step = 5e-3 * torch.randn(x.shape, generator=draw, dtype=x.dtype) * routed
        ends = [of.trace(given, do=Add(site, sign * step)).logits[0, -1].double() for sign in (1, -1)]
        ends = [logits[11] - logits[22] for logits in ends]
        assert float((ends[0] - ends[1]) / 2) == pytest.approx(float((g * step).sum()), rel=5e-3), site


@KINDS
@pytest.mark.parametrize("steps", [1, 8])
@EACH
def test_for_prompts_that_hardly_differ_it_is_what_patching_measures(name: str, steps: int, kind: str) -> None:
    of = fresh(name)
    with torch.no_grad():
        rows = of.hf.get_input_embeddings().weight
        rows[90], rows[93] = rows[71] + 1e-3 * rows[90], rows[73] + 1e-3 * rows[93]
    for by in ("expert", "neurons" if kind == "expert.act" else "position"):
        exact = changes(of, by=by, kind=kind)
        found = run("attribution_patching", of, by=by, kind=kind, steps=steps, draws=0)
        size = float(np.abs(exact).max())
        assert size > 1e-4
        np.testing.assert_allclose(found.values, exact, atol=0.03 * size)


def apart(of: Model) -> int:
    """The last layer, whose router now tells the two prompts apart at the last position: all experts change.

    The experts add so little that what follows is linear in it.
    """
    last = of.n_layers - 1
    path = of.layers[last].experts
    router: Any = next(
        m
        for n, m in of.hf.get_submodule(path.rpartition(".")[0]).named_modules()
        if n.startswith(("gate", "router")) and any(w.shape[0] == 4 for w in m.parameters(recurse=False))
    )
    states: list[Tensor] = []
    handle = router.register_forward_pre_hook(lambda _, args: states.append(args[0].reshape(len(CLEAN), -1)[-1]))
    for ids in (CLEAN, CORRUPT):
        of([ids])
    handle.remove()
    middle, way = (states[0] + states[1]) / 2, states[0] - states[1]
    across = way - (way @ middle) / (middle @ middle) * middle
    with torch.no_grad():
        weight = next(w for w in router.parameters(recurse=False) if w.ndim == 2)
        weight.copy_(torch.tensor([-2.0, -1.0, 1.0, 2.0])[:, None] * across / (across @ way))
        of.hf.get_submodule(path).down_proj *= 1e-2
    return last


@KINDS
@pytest.mark.parametrize("steps", [1, 8])
@EACH
def test_also_where_they_are_routed_to_other_experts(name: str, steps: int, kind: str) -> None:
    of = fresh(name)
    with torch.no_grad():
        rows = of.hf.get_input_embeddings().weight
        rows[90], rows[93] = rows[71] + 1e-2 * rows[90], rows[73] + 1e-2 * rows[93]
    last = apart(of)
    site = f"L{last}.expert.gate"
    clean, corrupt = ((of.trace([ids], want=site)[site] != 0)[0, -1] for ids in (CLEAN, CORRUPT))
    assert not bool((clean & corrupt).any())
    blocks: dict[str, Any] = {"by": "neurons", "blocks": 20}
    for params in (
        {"by": "expert"},
        {"by": "expert", "direction": "corrupt->clean"},
        *[blocks][: kind == "expert.act"],
    ):
        exact = changes(of, kind=kind, layers=str(last), **params)
        found = run("attribution_patching", of, kind=kind, layers=str(last), steps=steps, draws=0, **params)
        size = float(np.abs(exact).max())
        assert size > 5e-5
        np.testing.assert_allclose(found.values, exact, atol=0.08 * size)  # the metric bends a little


@pytest.mark.parametrize("steps", [1, 7])
@EACH
def test_an_expert_acts_only_where_the_run_that_receives_routes_to_it(name: str, steps: int) -> None:
    of = model(name)
    metric = of.metric("logit_diff: #11, #22")
    exchange = Exchange.of(of, CLEAN, CORRUPT, metric, "clean->corrupt")
    cells = Cells.of(of, "expert.act", "expert", None, "all", 16, exchange.prompt)
    found = estimate(of, exchange, cells.sites, steps)
    acts, gates = of.trace([CLEAN], want="L*.expert.act"), of.trace([CORRUPT], want="L*.expert.gate")
    away = silenced = 0
    for site in cells.sites:
        routed = gates[str(site).replace("act", "gate")][0] != 0
        elsewhere = acts[site][0].any(-1)
        away += int((~routed & elsewhere).sum())
        assert not found.terms[site][0][~routed].any()
        assert not found.gives[site][0][~routed].any()
        for p, e in (routed & ~elsewhere).nonzero().tolist():
            assert not found.gives[site][0, p, e].any()
            if site.layer < of.n_layers - 1:  # there, only the last position is read
                silenced += 1
                assert found.terms[site][0, p, e].any()
    assert away > 0
    assert silenced > 0
    layer = cells.sites[0].layer
    routed = gates[f"L{layer}.expert.gate"][0] != 0
    p, e = (~routed & acts[f"L{layer}.expert.act"][0].any(-1)).nonzero()[0].tolist()
    nothing = run("patch", of, by="expert", positions=str(p), layers=str(layer))
    assert nothing.values[0, e] == pytest.approx(nothing.center, abs=1e-6)
    p, e = (routed & ~acts[f"L{layer}.expert.act"][0].any(-1)).nonzero()[0].tolist()
    taken = run("patch", of, by="expert", positions=str(p), layers=str(layer))
    zeroed = of.trace([CORRUPT], do=Zero(f"L{layer}.expert.act[{e}]@{p}")).logits[0, -1]
    assert taken.values[0, e] == pytest.approx(float(zeroed[11] - zeroed[22]), abs=1e-5)
    assert abs(taken.values[0, e] - taken.center) > 1e-4


@KINDS
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_several_pairs_are_the_mean_of_each(name: str, steps: int, kind: str) -> None:
    of, others = model(name), ([60, 61, 62, 63, 64, 65], [60, 61, 40, 63, 64, 65])
    params: dict[str, Any] = {"kind": kind, "by": "expert", "steps": steps, "draws": 0}
    each = [run("attribution_patching", of, clean=a, corrupt=b, **params) for a, b in ((CLEAN, CORRUPT), others)]
    both = run("attribution_patching", of, clean=[CLEAN, others[0]], corrupt=[CORRUPT, others[1]], **params)
    np.testing.assert_allclose(both.values, (each[0].values + each[1].values) / 2, atol=2e-5)


def test_cells_are_experts_or_blocks_inside_one() -> None:
    of = model("DeepseekV3ForCausalLM")  # whose first layer is dense
    assert run("attribution_patching", of, by="expert").labels == {"layer": (1, 2), "expert": (0, 1, 2, 3)}
    few = run("attribution_patching", of, by="neurons", blocks=2)
    assert few.labels["neurons"] == ("0/0-39", "1/0-39", "2/0-39", "3/0-39")
    every = run("attribution_patching", of, by="neurons", blocks=10_000, steps=3)
    assert every.values.shape == (2, 160)
    assert every.labels["neurons"][41] == "1/1-1"
    experts = run("attribution_patching", of, by="expert", steps=3)
    places = run("attribution_patching", of, by="position", steps=3)
    np.testing.assert_allclose(every.values.reshape(2, 4, 40).sum(-1), experts.values, atol=1e-6)
    np.testing.assert_allclose(places.values.sum(-1), experts.values.sum(-1), atol=1e-6)


@pytest.mark.parametrize("method", ["patch", "attribution_patching"])
@pytest.mark.parametrize("by", ["expert", "neurons", "position"])
@pytest.mark.parametrize("name", ["experts", "sinks"])
def test_what_every_method_keeps(name: str, by: str, method: str, tmp_path: Path) -> None:
    of = architectures.fresh(name)
    of.hf.requires_grad_(False)
    before = Traces.of(of.hf)
    found = run(method, of, by=by)
    assert Traces.of(of.hf).differences(before) == []
    assert cutaway.rerun(found.save(tmp_path / "result"), of).equal
    assert f"expert.act patched clean->corrupt in {name}" in found.title
    pair = {name: of.inputs([ids, [*ids, 8, 9]]).take([0]) for name, ids in (("clean", CLEAN), ("corrupt", CORRUPT))}
    np.testing.assert_allclose(run(method, of, by=by, **pair).values, found.values, atol=1e-5)


@pytest.mark.parametrize("method", ["patch", "attribution_patching"])
@pytest.mark.parametrize(
    ("name", "params", "error", "sentence"),
    [
        ("grouped-query", {"by": "expert"}, SiteMissingError, "has no experts that transformers' interface serves"),
        ("grouped-query", {}, SiteMissingError, r"site 'L0.expert.act' of grouped-query"),
        ("grouped-query", {"kind": "mlp.act", "by": "expert"}, ParameterError, "choose kind expert.gate or expert.act"),
        ("experts", {"kind": "expert.gate", "by": "neurons"}, ParameterError, "choose kind mlp.act or expert.act"),
        ("experts", {"kind": "attn.z", "by": "expert"}, ParameterError, "by='expert' with kind='attn.z'"),
        ("experts", {"by": "head"}, ParameterError, "choose kind attn.q or attn.k or attn.v or attn.z"),
        ("experts", {"kind": "mlp.act"}, SiteMissingError, "is a mixture of experts: read expert.act"),
        ("experts", {"by": "experts"}, ParameterError, "'neurons' or 'expert'"),
    ],
)
def test_what_cannot_be_patched_says_why(
    method: str, name: str, params: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        run(method, architectures.model(name), **params)
