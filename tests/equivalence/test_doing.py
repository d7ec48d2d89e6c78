"""Interventions around any code: generation with a cache, nested blocks, several models, several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cutaway.core.errors import InputError, InterventionError, SiteMissingError
from cutaway.core.intervention import Add, Apply, Mean, Scale, Set, Zero
from cutaway.core.site import Site
from cutaway.models.handle import Model
from tests.architectures import ARCHITECTURES, CAUSAL, IMAGE, PROMPT, ROWS, every_site, fresh, gap, inputs, model

NEW = 4


def generated(of: Model, rows: list[list[int]], do: list[Any], **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens and their logits [step, row, vocab] of greedy generation with the cache."""
    batch = of.inputs(rows, padding_side="left")
    with of.doing(do):
        out = of.hf.generate(
            input_ids=batch.ids, attention_mask=batch.mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            return_dict_in_generate=True, output_logits=True, pad_token_id=0, **options,
        )  # fmt: skip
    return out.sequences[:, batch.ids.shape[1] :], torch.stack(out.logits)


def step_by_step(of: Model, rows: list[list[int]], new: Tensor, do: Callable[[int], list[Any]]) -> Tensor:
    """[step, row, vocab] logits of whole runs without a cache, each over one token more; ``do(step)`` in each."""
    steps = []
    for step in range(NEW):
        longer = [[*row, *new[b, :step].tolist()] for b, row in enumerate(rows)]
        batch = of.inputs(longer, padding_side="left")
        steps.append(of.trace(batch, do=do(step)).logits[:, -1])
    return torch.stack(steps)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize(
    "site",
    [
        "L1.attn.z[2]@2",
        "L0.resid_post@2",
        "L1.attn.k[0]@2",
        "L0.attn.z[0+3]",
        "L1.attn.v",
        "L1.attn.pattern[1]",
        "embed@0-2",
    ],
)
def test_generation_with_the_cache_equals_runs_without_it(name: str, site: str) -> None:
    of = model(name)
    do = [Scale(site, 0.3)]
    new, cached = generated(of, ROWS, do)
    assert gap(cached, step_by_step(of, ROWS, new, lambda step: do)) < 2e-5
    assert not torch.equal(cached, generated(of, ROWS, [])[1])


@pytest.mark.parametrize("name", [name for name in CAUSAL if model(name)._takes_cache])
def test_the_last_position_is_every_generated_one_in_turn(name: str) -> None:
    of = model(name)
    new, cached = generated(of, ROWS, [Add("L0.resid_post@-1", 0.2)])
    # the cache keeps what was done to each token when it was the last
    plain = step_by_step(of, ROWS, new, lambda step: [Add(f"L0.resid_post@{-1 - step}--1", 0.2)])
    assert gap(cached, plain) < 2e-5


@pytest.mark.parametrize("name", ["dense", "grouped-query", "sliding-softcap", "no-interface", "post-norm"])
def test_neurons_of_one_position_while_generating(name: str) -> None:
    of = model(name)
    do = [Zero("L1.mlp.act[0-47]@1"), "scale L0.mlp.out 0.5"]
    new, cached = generated(of, ROWS, do)
    assert gap(cached, step_by_step(of, ROWS, new, lambda step: do)) < 2e-5


@pytest.mark.parametrize("name", ["experts", "sinks"])
def test_experts_while_generating(name: str) -> None:
    of = model(name)
    do = [Zero("L1.expert.act[0/0-19]"), Scale("L0.expert.gate[1]", 0.5)]
    new, cached = generated(of, ROWS, do)
    assert gap(cached, step_by_step(of, ROWS, new, lambda step: do)) < 2e-5


def test_a_position_that_is_not_there_yet_acts_once_it_is() -> None:
    of, rows = model("grouped-query"), [PROMPT]
    do = [Zero(f"L1.resid_post@{len(PROMPT) + 1}")]
    plain_new, plain = generated(of, rows, [])
    new, cached = generated(of, rows, do)
    assert torch.equal(cached[:2], plain[:2])
    assert gap(cached[2], plain[2]) > 1e-3
    there = lambda step: do if step > 1 else []  # noqa: E731
    assert gap(cached, step_by_step(of, rows, new, there)) < 2e-5
    assert plain_new.shape == new.shape


def test_beams_and_sampling_run_under_interventions() -> None:
    of = model("dense")
    zeroed = Set("L2.resid_post", torch.zeros(64))
    with of.doing(zeroed):
        out = of.hf.generate(input_ids=torch.tensor([PROMPT]), num_beams=3, max_new_tokens=3, pad_token_id=0)
    assert out.shape[1] > len(PROMPT)


@pytest.mark.parametrize("name", IMAGE)
def test_generation_with_an_image_equals_runs_without_the_cache(name: str) -> None:
    of, given = model(name), inputs(name)
    do = [Scale("vision/L0.mlp.out", 0.5), Scale("projector", 0.8), Zero("L1.attn.z[1]"), Add("L0.resid_post@2", 0.3)]
    call = {"input_ids": given.ids, "attention_mask": given.mask, **given.extra}
    with of.doing(do, inputs=given):
        out = of.hf.generate(
            **call, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True,
            output_logits=True, pad_token_id=0,
        )  # fmt: skip
    longer = dict(call)
    for step, logits in enumerate(out.logits):
        assert gap(logits, of.trace(of.inputs(dict(longer)), do=do).logits[:, -1]) < 2e-5, step
        token = out.sequences[:, given.ids.shape[1] + step][:, None]
        longer["input_ids"] = torch.cat([longer["input_ids"], token], dim=1)
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        if "mm_token_type_ids" in longer:
            kinds = longer["mm_token_type_ids"]
            longer["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(kinds[:, :1])], dim=1)


def test_a_cache_of_fixed_size_is_served_or_refused_never_wrong() -> None:
    of = model("grouped-query")
    do = [Scale("L1.attn.z[2]@2", 0.3)]
    try:
        new, cached = generated(of, ROWS, do, cache_implementation="static", disable_compile=True)
    except InputError as error:
        assert "attention mask" in str(error)  # noqa: PT017 - either way is right
    else:
        assert gap(cached, step_by_step(of, ROWS, new, lambda step: do)) < 2e-5


# -- nesting ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_nest_and_the_outer_one_acts_first(name: str) -> None:
    of, given = model(name), inputs(name)
    for site in ("L1.resid_post", "L1.attn.q", "L0.attn.z[1]", "L1.attn.pattern", "embed"):
        both = of.trace(given, want=site, do=[Add(site, 1.0), Scale(site, 3.0)])
        with of.doing(Add(site, 1.0)):
            with of.doing(Scale(site, 3.0)), torch.no_grad():
                nested = of.hf(**of._kwargs(given)).logits
            traced = of.trace(given, want=site, do=Scale(site, 3.0))
            outer = of(given)
        assert gap(nested, both.logits) < 1e-6, site
        assert gap(traced.logits, both.logits) < 1e-6, site
        assert gap(traced[Site.parse(site)], both[site]) < 1e-6, site
        assert torch.equal(outer, of.trace(given, do=Add(site, 1.0)).logits), site


def test_a_trace_inside_a_block_sees_what_the_block_does() -> None:
    of, given = model("grouped-query"), inputs("grouped-query")
    wants = every_site(of, given)
    whole = of.trace(given, want=wants, do=Zero("L1.attn.z[0]"))
    with of.doing("zero L1.attn.z[0]"):
        inside = of.trace(given, want=wants)
        part = of.trace([PROMPT[:2]], want="L0.resid_post", do="zero L0.mlp.out")
        graded = of.trace(given, want="L2.resid_post", grad="logit: #11")
    assert all(torch.equal(inside[s], whole[s]) for s in whole)
    assert part["L0.resid_post"].shape[1] == 2
    assert torch.equal(graded.logits, inside.logits)


def test_an_intervention_may_run_the_model_itself() -> None:
    of, given = model("dense"), inputs("dense")
    plain = of.trace(given, want="L1.resid_post")

    def from_the_bare_model(x: Tensor, where: Any) -> Tensor:
        return of.trace(given, want="L1.resid_post")["L1.resid_post"] * 2

    found = of.trace(given, want="L1.resid_post", do=[Zero("L0.attn.out"), Apply("L1.resid_post", from_the_bare_model)])
    assert torch.equal(found["L1.resid_post"], plain["L1.resid_post"] * 2)


@pytest.mark.parametrize("name", ["dense", "no-interface"])
def test_a_failed_call_inside_a_block_does_not_spoil_the_next(name: str) -> None:
    of, given = fresh(name), inputs(name)
    do = [Scale("L1.attn.scores", 0.5), Scale("L1.attn.out", 2.0)]
    expected = of.trace(given, do=do).logits
    fails = [True]

    def hook(*_: Any) -> None:
        if fails.pop() if fails else False:
            raise RuntimeError("a user's hook failed")

    inside = of.hf.get_submodule(of.layers[1].attention.module)  # type: ignore[union-attr]
    next(m for m in inside.modules() if m is not inside).register_forward_hook(hook)
    with of.doing(do), torch.no_grad():
        with pytest.raises(RuntimeError, match="a user's hook failed"):
            of.hf(**of._kwargs(given))
        assert torch.allclose(torch.softmax(torch.eye(3), -1).sum(-1), torch.ones(3))
        assert torch.equal(of.hf(**of._kwargs(given)).logits, expected)


# -- several models, several threads, others' hooks -------------------------------------------------------------------
def test_two_models_at_once_do_not_mix() -> None:
    one, two = fresh("grouped-query"), fresh("grouped-query")
    given = inputs("grouped-query")
    do = Zero("L1.attn.z[0]")
    changed, plain = one.trace(given, do=do).logits, two(given)
    with one.doing(do):
        assert torch.equal(two(given), plain)
        assert torch.equal(one(given), changed)
        with two.doing(Zero("L0.attn.pattern[1]")):
            assert torch.equal(one(given), changed)
            assert not torch.equal(two(given), plain)
    assert torch.equal(one(given), plain)


@pytest.mark.parametrize("name", ["grouped-query", "no-interface", "experts"])
def test_threads_do_not_see_each_others_interventions(name: str) -> None:
    of, given = model(name), inputs(name)
    wants = every_site(of, given)
    does = [[], [Zero("L1.attn.z[0]")], [Scale("L0.attn.pattern", 0.5)], [Add("L1.resid_post", 1.0)]]
    expected = [of.trace(given, want=wants, do=do) for do in does]
    wrong: list[Any] = []
    ready = threading.Barrier(len(does))

    def work(i: int) -> None:
        torch.set_num_threads(1)
        ready.wait()
        for _ in range(6):
            trace = of.trace(given, want=wants, do=does[i])
            wrong.extend((i, s) for s in expected[i] if not torch.equal(trace[s], expected[i][s]))
            with of.doing(does[i]):
                if not torch.equal(of(given), of.trace(given, do=does[i][:0]).logits):
                    wrong.append((i, "doing"))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(does))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("name", ["dense", "grouped-query", "qwen-vl"])
def test_hooks_of_the_user_survive_and_are_seen(name: str) -> None:
    of, given = fresh(name), inputs(name)
    plain = of.trace(given, want="L1.mlp.out, L1.resid_post")

    def double_it(module: Any, args: Any, out: Any) -> Any:
        return out * 2

    path = of.layers[1].read["mlp.out"].module
    assert of.layers[1].read["mlp.out"].where == "out"
    of.hf.get_submodule(path).register_forward_hook(double_it)
    with torch.no_grad():
        bare = of.hf(**of._kwargs(given)).logits
    trace = of.trace(given, want="L1.mlp.out, L1.resid_post")
    assert torch.equal(trace.logits, bare)
    assert torch.equal(trace["L1.mlp.out"], plain["L1.mlp.out"] * 2)
    graded = of.trace(given, want="L1.mlp.out", grad="logit: #11")
    assert torch.equal(graded["L1.mlp.out"], trace["L1.mlp.out"])
    ours = of.trace(given, want="L1.mlp.out", do=Set("L1.mlp.out", 1.0))["L1.mlp.out"]
    assert torch.equal(ours, torch.full_like(ours, 2.0))  # ours first, then theirs
    assert double_it in of.hf.get_submodule(path)._forward_hooks.values()


# -- refused ----------------------------------------------------------------------------------------------------------
def test_roles_are_refused_where_they_are_not_known() -> None:
    of = model("dense")
    with of.doing(Zero("L0.resid_post@text")), pytest.raises(SiteMissingError, match="roles are not known"):
        of(inputs("dense"))


def test_the_vision_tower_has_to_be_read_before_a_block_around_it() -> None:
    of = fresh("llava")
    with pytest.raises(SiteMissingError, match="not read yet"), of.doing("zero vision/L0.mlp.out"):
        pass
    with of.doing("zero vision/L0.mlp.out", inputs=inputs("llava")):
        changed = of(inputs("llava"))
    assert torch.equal(changed, of.trace(inputs("llava"), do="zero vision/L0.mlp.out").logits)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x, w: x[:, :1], r"returned \[1, 1, 4, 16\] .* for \[1, 9, 4, 16\]"),
        (lambda x, w: x.double(), "torch.float64"),
        (lambda x, w: x / 0, "NaN or infinite"),
        (lambda x, w: x * float("nan"), "576 of 576 values are NaN"),
        (lambda x, w: x.mul_(2), "wrote into the activation"),
        (lambda x, w: None, "returned NoneType"),
        (lambda x, w: x.tolist(), "returned list"),
    ],
)
def test_what_an_intervention_may_not_return_is_named(function: Any, found: str) -> None:
    of, given = model("grouped-query"), inputs("grouped-query")
    plain = of(given)
    with pytest.raises(InterventionError, match=rf"apply L1.attn.z.* at 'L1.attn.z': .*{found}"):
        of.trace(given, want="L*.attn.pattern", do=Apply("L1.attn.z", function))
    assert torch.equal(of(given), plain)


def test_masked_scores_may_stay_infinite_but_not_become_nan() -> None:
    of, given = model("dense"), inputs("dense")
    closed = Apply("L0.attn.scores[0]", lambda x, w: torch.where(torch.eye(x.shape[-1]).bool(), x, -torch.inf))
    pattern = of.trace(given, want="L0.attn.pattern", do=closed)["L0.attn.pattern"][0, 0]
    assert torch.equal(pattern, torch.eye(len(PROMPT)))
    with pytest.raises(InterventionError, match="NaN"):
        of.trace(given, do=Scale("L0.attn.scores", float("nan")))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_values_given_to_interventions_are_not_written_to(name: str) -> None:
    of, given = model(name), inputs(name)
    for site, x in of.trace(given, want=every_site(of, given)).items():
        if site.kind == "attn.scores" or (site.layers is not None and site.layer > 0):
            continue
        value, kept = x.clone(), x.clone()
        whole = of.anatomy(given).layers(site.scope)[0].attention.calls == 1 or not site.kind.startswith("attn.")
        same = [Apply(site, lambda _, w, value=value: value)] if whole else []
        of.trace(given, do=[Set(site, value), *same, Mean(site, value)])
        assert torch.equal(value, kept), site
