"""The engine against Hugging Face itself and against plain forwards written out by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Add, Apply, Intervention, Mean, Project, Scale, Set, Swap, Zero
from cutaway.core.site import KINDS, Site
from cutaway.models.handle import Model
from tests.architectures import (
    ARCHITECTURES,
    IMAGE,
    ROWS,
    TEXT,
    double,
    every_site,
    features,
    fresh,
    gap,
    inputs,
    kinds,
    model,
)
from tests.equivalence.reference import REFERENCES

EVERY = pytest.mark.parametrize("name", ARCHITECTURES)
REFERENCE = pytest.mark.parametrize("name", REFERENCES)
CLOSE = {
    "dense": 1e-12,
    "grouped-query": 2e-6,
}  # in float64; Llama norms and rotates in float32 all the same
ROUNDING = 2e-6
UNMASKED = -1e3  # scores above this are of keys that the query sees
LAYERED = [kind for kind, about in KINDS.items() if about.layered and not kind.startswith("expert.") and kind != "sae"]


# -- watching changes nothing -----------------------------------------------------------------------------------------
@EVERY
def test_logits_are_those_of_the_bare_model_bit_for_bit(name: str) -> None:
    of, given = model(name), inputs(name)
    with torch.no_grad():
        bare = of.hf(**features(name)).logits
    assert torch.equal(of(given), bare)
    assert torch.equal(of.trace(given).logits, bare)
    trace = of.trace(given, want=every_site(of, given))
    assert torch.equal(trace.logits, bare)
    assert all(torch.isfinite(x).all() for s, x in trace.items() if s.kind != "attn.scores")


@EVERY
def test_sites_may_be_asked_for_in_any_order_and_alone(name: str) -> None:
    of, given = model(name), inputs(name)
    sites = of.expand(every_site(of, given), given)
    together = of.trace(given, want=sites)
    shuffled = random.Random(0).sample(sites, len(sites))
    again = of.trace(given, want=shuffled)
    assert list(again) == list(together)
    assert all(torch.equal(again[s], together[s]) for s in sites)
    for site in sites:
        assert torch.equal(of.trace(given, want=site)[site], together[site]), site


@EVERY
def test_tensors_have_the_axes_and_sizes_that_the_site_says(name: str) -> None:
    of, given = model(name), inputs(name)
    rows, length = given.ids.shape
    for site, x in of.trace(given, want=every_site(of, given)).items():
        assert x.ndim == len(site.axes)
        if KINDS[site.kind].index_axis:
            assert x.shape[site.axes.index(KINDS[site.kind].index_axis)] == of.anatomy(given).size(site)
        if not site.scope and "batch" in site.axes:
            sizes = dict(zip(site.axes, x.shape, strict=True))
            assert sizes["batch"] == rows
            assert {sizes[a] for a in ("pos", "key_pos", "query_pos") if a in sizes} == {length}


@EVERY
def test_a_part_of_a_site_is_that_part_of_the_whole(name: str) -> None:
    of, given = model(name), inputs(name)
    n = given.ids.shape[1]
    for kind in kinds(of):
        whole = of.trace(given, want=f"L*.{kind}")
        axes, about = KINDS[kind].axes, KINDS[kind]
        where = next(i for i, a in enumerate(axes) if a in ("pos", "query_pos", "key_pos"))
        for text, at in (
            ("-1", [n - 1]),
            ("0-2", [0, 1, 2]),
            ("5+1-2", [5, 1, 2]),
            ("-3--2", [n - 3, n - 2]),
            ("2+-1", [2, n - 1]),
        ):
            for layer in (0, -1):
                part = of.trace(given, want=f"L{layer}.{kind}@{text}")[f"L{layer}.{kind}@{text}"]
                assert torch.equal(part, whole[f"L{layer}.{kind}"].index_select(where, torch.tensor(at)))
                if about.index_axis:
                    axis = axes.index(about.index_axis)
                    both = of.trace(given, want=f"L{layer}.{kind}[1+0]@{text}")[f"L{layer}.{kind}[1+0]@{text}"]
                    assert torch.equal(both, part.index_select(axis, torch.tensor([1, 0])))


@pytest.mark.parametrize("name", TEXT)
def test_padding_changes_no_real_token(name: str) -> None:
    of = model(name)
    wants = every_site(of, inputs(name))
    alone = [of.trace([row], want=wants) for row in ROWS]
    for side in ("left", "right"):
        batch = of.inputs(list(ROWS), padding_side=side)
        trace = of.trace(batch, want=wants)
        for b, (row, own) in enumerate(zip(batch.real, alone, strict=True)):
            assert gap(trace.logits[b, row], own.logits[0]) < 1e-5, (side, b)
            for site, x in trace.items():
                mine = _real(x[b], site, row)
                theirs = own[site][0]
                seen = theirs > UNMASKED
                assert gap(torch.where(seen, mine, 0), torch.where(seen, theirs, 0)) < 2e-5, (side, b, site)


def _real(x: Tensor, site: Site, row: list[int]) -> Tensor:
    """One row's tensor, batch axis gone, at its real tokens."""
    for axis, name in enumerate(site.axes[1:]):
        if name in ("pos", "query_pos", "key_pos"):
            x = x.index_select(axis, torch.tensor(row))
    return x


@pytest.mark.parametrize("name", TEXT)
def test_positions_count_real_tokens_whatever_the_padding(name: str) -> None:
    of = model(name)
    for side in ("left", "right"):
        batch = of.inputs(list(ROWS), padding_side=side)
        whole = of.trace(batch, want="L1.resid_post")["L1.resid_post"]
        last = of.trace(batch, want="L1.resid_post@-1")["L1.resid_post@-1"]
        assert torch.equal(last[:, 0], whole[torch.arange(len(ROWS)), torch.tensor(batch.last)])
        second = of.trace(batch, want="L1.resid_post@1")["L1.resid_post@1"]
        assert torch.equal(second[:, 0], torch.stack([whole[b, row[1]] for b, row in enumerate(batch.real)]))
        only = of.trace(batch, do=Zero("L1.resid_post@-1"), want="L1.resid_post")["L1.resid_post"]
        changed = (only != whole).any(-1)
        assert [row.nonzero().flatten().tolist() for row in changed] == [[p] for p in batch.last]


@EVERY
def test_stop_runs_no_layer_after_the_last_that_is_wanted(name: str) -> None:
    of, given = fresh(name), inputs(name)
    ran: list[str] = []
    stack = of.anatomy(given).stacks[""]
    for layer in stack:
        of.hf.get_submodule(layer.path).register_forward_hook(lambda m, a, o, path=layer.path: ran.append(path))
    whole = of.trace(given, want="L*.resid_post")
    ran.clear()
    for site, count in (("embed", 1), ("L0.resid_post", 1), ("L1.resid_pre", 2), ("L1.attn.z, L0.resid_pre", 2)):
        trace = of.trace(given, want=site, stop=True)
        assert trace.logits is None
        assert len(ran) == count, site
        ran.clear()
    assert torch.equal(of.trace(given, want="L0.resid_post", stop=True)["L0.resid_post"], whole["L0.resid_post"])
    ran.clear()
    assert of.trace(given, want="final_norm", stop=True).logits is not None
    assert len(ran) == len(stack)


@pytest.mark.parametrize("name", IMAGE)
def test_stop_in_the_vision_tower_runs_no_text_layer(name: str) -> None:
    of, given = fresh(name), inputs(name)
    ran: list[int] = []
    of.hf.get_submodule(of.anatomy(given).stacks[""][0].path).register_forward_hook(lambda m, a, o: ran.append(1))
    trace = of.trace(given, want="vision/L0.mlp.act", stop=True)
    assert (trace.logits, ran) == (None, [])
    assert torch.equal(trace["vision/L0.mlp.act"], of.trace(given, want="vision/L0.mlp.act")["vision/L0.mlp.act"])


def test_stored_activations_go_where_and_become_what_is_asked() -> None:
    of, given = model("grouped-query"), inputs("grouped-query")
    plain = of.trace(given, want="L0.resid_post")
    trace = of.trace(given, want="L0.resid_post, L1.attn.pattern", dtype=torch.float64, device="meta")
    assert {(x.dtype, x.device.type) for x in trace.values()} == {(torch.float64, "meta")}
    assert torch.equal(trace.logits, plain.logits)
    half = of.trace(given, want="L0.resid_post", dtype=torch.float16)["L0.resid_post"]
    assert torch.equal(half, plain["L0.resid_post"].half())
    assert of.device.type == "cpu"


@EVERY
def test_a_small_part_does_not_keep_the_whole_tensor_alive(name: str) -> None:
    of, given = model(name), inputs(name)
    trace = of.trace(given, want="L0.resid_post@-1, L1.attn.z[0]@0, L1.attn.pattern[1]")
    for site, x in trace.items():
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size(), site
        assert not x.requires_grad


# -- against a forward written out by hand ----------------------------------------------------------------------------
def by_hand(name: str, given: Inputs, edits: dict[str, Callable[[Tensor], Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and every activation of the plain reference, with edits at sites."""
    seen: dict[str, Tensor] = {}

    def at(site: str, x: Tensor) -> Tensor:
        seen[site] = edits[site](x) if site in edits else x
        return seen[site]

    return REFERENCES[name](double(name).hf, given.ids, at), seen


@REFERENCE
def test_every_site_is_what_the_plain_forward_has_there(name: str) -> None:
    of, given = double(name), inputs(name)
    with torch.no_grad():
        logits, seen = by_hand(name, given, {})
    trace = of.trace(given, want=every_site(of, given))
    assert gap(trace.logits, logits) < CLOSE[name]
    assert {str(site) for site in trace} == set(seen)
    for site, x in trace.items():
        own = seen[str(site)]
        if site.kind == "attn.scores":
            assert torch.equal(x > UNMASKED, own > UNMASKED)
            x, own = torch.where(own > UNMASKED, x, 0), torch.where(own > UNMASKED, own, 0)
        assert gap(x, own) < CLOSE[name], site


@REFERENCE
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_gradients_at_every_site_are_autograds(name: str, *, frozen: bool) -> None:
    of = Model(fresh(name).hf.double())
    of.hf.requires_grad_(not frozen)
    given = inputs(name)
    reached: dict[str, Tensor] = {}

    def at(site: str, x: Tensor) -> Tensor:
        reached[site] = x if x.requires_grad else x.detach().requires_grad_()
        return reached[site]

    logits = REFERENCES[name](of.hf, given.ids, at)
    value = logits[0, -1].log_softmax(-1)[11]
    own = dict(zip(reached, torch.autograd.grad(value, list(reached.values())), strict=True))
    trace = of.trace(given, want=every_site(of, given), grad="logprob: #11")
    assert float(trace.value[0]) == pytest.approx(float(value.detach()), abs=1e-6)
    for site, g in trace.grads.items():
        assert gap(g, own[str(site)]) < CLOSE[name] * 10, site
    assert all(p.grad is None for p in of.hf.parameters())
    assert all(p.requires_grad is not frozen for p in of.hf.parameters())
    part = of.trace(given, want="L1.attn.z[2]@-1", grad="logprob: #11").grads["L1.attn.z[2]@-1"]
    assert gap(part, own["L1.attn.z"][:, -1:, 2:3]) < CLOSE[name] * 10


DIRECTION = torch.linspace(-1, 1, 256).double()
CHANGES: dict[str, tuple[Callable[[str, Tensor], Intervention], Callable[[Tensor], Tensor]]] = {
    "zero": (lambda at, x: Zero(at), torch.zeros_like),
    "set": (lambda at, x: Set(at, x.flip(-1)), lambda x: x.flip(-1)),
    "set number": (lambda at, x: Set(at, 0.25), lambda x: torch.full_like(x, 0.25)),
    "add": (lambda at, x: Add(at, 0.5), lambda x: x + 0.5),
    "scale": (lambda at, x: Scale(at, -2.0), lambda x: x * -2),
    "mean": (lambda at, x: Mean(at), lambda x: x.mean(dim=(0, 1), keepdim=True).expand_as(x)),
    "project": (
        lambda at, x: Project(at, DIRECTION[: x.shape[-1]]),
        lambda x: x - (x @ (d := DIRECTION[: x.shape[-1]] / DIRECTION[: x.shape[-1]].norm()))[..., None] * d,
    ),
    "apply": (lambda at, x: Apply(at, lambda y, where: y.sin()), torch.sin),
}  # fmt: skip


@REFERENCE
@pytest.mark.parametrize("change", CHANGES)
def test_interventions_at_every_site_do_what_an_edit_by_hand_does(name: str, change: str) -> None:
    of, given = double(name), inputs(name)
    plain = of.trace(given, want=every_site(of, given))
    make, edit = CHANGES[change]
    for kind in (*LAYERED, "embed", "final_norm"):
        if kind in ("attn.scores", "attn.pattern") and change in ("mean", "project", "set"):
            continue  # these mix keys that a query sees with keys that it does not
        site = f"L1.{kind}" if KINDS[kind].layered else kind
        seen = lambda x, kind=kind: torch.where(x > UNMASKED, edit(x), x) if kind == "attn.scores" else edit(x)  # noqa: E731
        with torch.no_grad():
            logits, acts = by_hand(name, given, {site: seen})
        do = make(site, plain[site])
        if kind == "attn.scores":
            do = Apply(site, lambda x, where, seen=seen: seen(x))
        trace = of.trace(given, want=[site, "L1.resid_post"], do=do)
        close = 2e-6 if change == "project" else CLOSE[name]  # projections are made in float32
        assert gap(trace.logits, logits) < close, site
        assert gap(trace["L1.resid_post"], acts["L1.resid_post"]) < close, site
        assert gap(trace[site].clamp(min=UNMASKED), acts[site].clamp(min=UNMASKED)) < close, site


@REFERENCE
def test_interventions_at_heads_neurons_and_positions_change_just_those(name: str) -> None:
    of, given = double(name), inputs(name)
    for site, where in (
        ("L1.attn.z[2]@-1", ("L1.attn.z", (slice(None), [-1], [2]))),
        ("L0.mlp.act[7+30-31]@0-3", ("L0.mlp.act", (slice(None), slice(0, 4), [7, 30, 31]))),
        ("L2.attn.pattern[0]", ("L2.attn.pattern", (slice(None), [0]))),
        ("L0.attn.k[1]@2", ("L0.attn.k", (slice(None), [2], [1]))),
        ("L0.resid_mid@4+-2", ("L0.resid_mid", (slice(None), [4, -2]))),
    ):
        whole, at = where

        def edit(x: Tensor, at: Any = at) -> Tensor:
            x = x.clone()
            x[at] *= 0.25
            return x

        with torch.no_grad():
            logits, _ = by_hand(name, given, {whole: edit})
        assert gap(of.trace(given, do=Scale(site, 0.25)).logits, logits) < CLOSE[name], site
        assert gap(of.trace(given, do=f"scale {site} 0.25").logits, logits) < CLOSE[name], site


@REFERENCE
def test_several_interventions_act_in_the_order_given(name: str) -> None:
    of, given = double(name), inputs(name)
    with torch.no_grad():
        logits, _ = by_hand(name, given, {"L1.mlp.out": lambda x: x * 3 + 1, "L0.attn.q": torch.zeros_like})
    found = of.trace(given, do=[Scale("L1.mlp.out", 3), Add("L1.mlp.out", 1), Zero("L0.attn.q")]).logits
    assert gap(found, logits) < CLOSE[name]


@REFERENCE
def test_a_swap_puts_in_what_another_run_had(name: str) -> None:
    of, given = double(name), inputs(name)
    other = of.trace([row[::-1] for row in given.ids.tolist()], want="L1.attn.z[0], L0.resid_post")
    with torch.no_grad():

        def edit(x: Tensor) -> Tensor:
            return torch.cat([other["L1.attn.z[0]"], x[:, :, 1:]], dim=2)

        logits, _ = by_hand(name, given, {"L1.attn.z": edit})
        moved, _ = by_hand(name, given, {"L2.resid_pre": lambda x: other["L0.resid_post"]})
    assert gap(of.trace(given, do=Swap("L1.attn.z[0]", other)).logits, logits) < CLOSE[name]
    assert gap(of.trace(given, do=Swap("L2.resid_pre", other, "L0.resid_post")).logits, moved) < CLOSE[name]


@REFERENCE
def test_a_mean_leaves_padding_out(name: str) -> None:
    of = double(name)
    whole = [of.trace([row], want="L1.attn.z")["L1.attn.z"][0] for row in ROWS]
    mean = torch.cat(whole).mean(dim=0)
    for side in ("left", "right"):
        batch = of.inputs(list(ROWS), padding_side=side)
        trace = of.trace(batch, want="L1.attn.z", do="mean L1.attn.z")
        for b, row in enumerate(batch.real):
            assert gap(trace["L1.attn.z"][b, row], mean.expand(len(row), -1, -1)) < 1e-10
            set_alone = of.trace([ROWS[b]], do=Set("L1.attn.z", mean))
            assert gap(trace.logits[b, row], set_alone.logits[0]) < 1e-9


# -- every kind of every architecture ---------------------------------------------------------------------------------
@EVERY
def test_writes_and_gradients_agree_with_finite_differences(name: str) -> None:
    of = double(name)
    given = inputs(name, of)
    sites = of.expand(every_site(of, given), given)
    trace = of.trace(given, want=sites, grad="logprob: #11")
    plain = of.trace(given, want=sites)
    metric, draw = of.metric("logprob: #11"), torch.Generator().manual_seed(0)
    for site in sites:
        if site.layers is not None and site.layer > 1:
            continue
        x, g = plain[site], trace.grads[site]
        assert gap(trace[site].clamp(min=UNMASKED), x.clamp(min=UNMASKED)) < ROUNDING, site
        step = torch.randn(x.shape, generator=draw, dtype=x.dtype) * 3e-3 * x[x > UNMASKED].std() * (x > UNMASKED)
        if site.kind.startswith("expert."):
            step = step * (x != 0)  # a token that an expert does not get has no neurons in it
        ends = [metric(of.trace(given, do=Add(site, s * step)).logits, given)[0] for s in (1, -1)]
        slope = float((g * step).sum())
        scale = max(abs(slope), float(g.norm() * step.norm()) / g.numel() ** 0.5, 1e-12)
        assert abs(float(ends[0] - ends[1]) / 2 - slope) / scale < 1e-2, site


@EVERY
def test_setting_a_site_to_what_it_is_changes_nothing(name: str) -> None:
    of = double(name)
    given = inputs(name, of)
    trace = of.trace(given, want=every_site(of, given))
    together = of.trace(given, want=list(trace), do=[Set(site, x) for site, x in trace.items()])
    assert gap(together.logits, trace.logits) < ROUNDING
    assert list(together) == list(trace)
    for site, x in trace.items():
        assert gap(of.trace(given, do=Set(site, x)).logits, trace.logits) < ROUNDING, site
        assert gap(together[site].clamp(min=UNMASKED), x.clamp(min=UNMASKED)) < ROUNDING, site


@EVERY
def test_what_is_set_is_what_is_read_and_what_follows_it_changes(name: str) -> None:
    of = double(name)
    given = inputs(name, of)
    plain = of.trace(given, want=every_site(of, given))
    for site, x in plain.items():
        if site.kind == "attn.scores" or (site.layers is not None and site.layer > 0):
            continue
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype) * x.std()
        value = x + noise * (x != 0)
        trace = of.trace(given, want=[site, "L0.resid_post"], do=Set(site, value))
        assert torch.equal(trace[site], value), site
        assert gap(trace.logits, plain.logits) > 1e-9, site
