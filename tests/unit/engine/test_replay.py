"""What a sweep says, refuses and leaves behind."""

import weakref
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cutaway.core.errors import InputError, InterventionError, SiteRangeError, SiteSyntaxError, UnsupportedError
from cutaway.core.intervention import Apply, Set, Where, Zero
from cutaway.core.metric import Metric
from cutaway.engine import plan_memory, replay
from cutaway.engine.base import record
from cutaway.models.handle import Model
from cutaway.models.interface import ATTENTION
from cutaway.models.tiny import tiny

LOGIT = Metric("logit", (5,))
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


@cache
def model(name: str = "LlamaForCausalLM") -> Model:
    return Model(tiny(name).hf)


def hooks(hf: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())


@pytest.fixture
def untouched() -> Iterator[Model]:
    """A model whose weights, configuration, hooks and attention look-up are the same afterwards."""
    m = model()
    m.anatomy()
    before = {k: v.clone() for k, v in m.hf.state_dict().items()}
    config, count = m.hf.config.to_dict(), hooks(m.hf)
    yield m
    assert all(torch.equal(v, before[k]) for k, v in m.hf.state_dict().items())
    assert m.hf.config.to_dict() == config
    assert hooks(m.hf) == count == 0
    assert not ATTENTION._handlers
    assert not any("forward" in vars(module) for module in m.hf.modules())


def test_a_sweep_leaves_the_model_as_it_was(untouched: Model) -> None:
    runs = [Zero(f"L{i}.{kind}") for i in range(3) for kind in ("resid_mid", "attn.z[0]", "mlp.act[1]", "resid_pre@-1")]
    assert replay(untouched, IDS, runs, LOGIT).how == "replay"
    assert replay(untouched, IDS, [runs, runs[::-1]], LOGIT).how == "replay"


def test_an_exception_inside_leaves_the_model_as_it_was(untouched: Model) -> None:
    def explode(x: torch.Tensor, where: object) -> torch.Tensor:
        raise ZeroDivisionError("inside")

    replay(untouched, IDS, [Zero("L1.resid_mid")], LOGIT)
    with pytest.raises(ZeroDivisionError, match="inside"):
        replay(untouched, IDS, [Zero("L0.resid_mid"), Apply("L1.resid_mid", explode)], LOGIT)
    for kind in ("resid_mid", "attn.k", "mlp.act"):
        replay(untouched, IDS, [[Zero("L0.attn.v"), Zero(f"L1.{kind}")]], LOGIT)
        with pytest.raises(ZeroDivisionError, match="inside"):
            replay(untouched, IDS, [[Zero("L0.attn.v"), Apply(f"L1.{kind}", explode)]], LOGIT)


def test_an_exception_in_a_layer_leaves_the_model_as_it_was(untouched: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [Zero("L0.attn.z[0]"), Zero("L1.attn.out")]
    replay(untouched, IDS, runs, LOGIT)
    norm = untouched.hf.get_submodule(untouched.layers[-1].path).post_attention_layernorm
    calls = []

    def second_call_fails(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        if len(calls) > 1:
            raise ZeroDivisionError("in the layer")
        return type(norm).forward(norm, x)

    with monkeypatch.context() as patch:
        patch.setattr(norm, "forward", second_call_fails)
        with pytest.raises(ZeroDivisionError, match="in the layer"):
            replay(untouched, IDS, runs, LOGIT)


def test_a_mistaken_replay_is_found_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that mixes rows beside its attention cannot be packed: the check at first use sees it."""
    m = Model(tiny("LlamaForCausalLM").hf)
    norm = m.hf.get_submodule(m.layers[1].path).post_attention_layernorm

    def mixing(x: torch.Tensor) -> torch.Tensor:
        return type(norm).forward(norm, x + x.cumsum(dim=1))

    monkeypatch.setattr(norm, "forward", mixing)
    runs = [Zero(f"L{i}.resid_pre@{p}") for i in range(2) for p in (0, 3)]
    found = replay(m, IDS, runs, LOGIT)
    assert found.how.startswith("plain: replaying 'L0.resid_pre@0' gave logits off by")
    torch.testing.assert_close(found.values, replay(m, IDS, runs, LOGIT, plain=True).values)


def test_a_layer_that_cannot_take_packed_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    m = Model(tiny("LlamaForCausalLM").hf)
    m.anatomy()
    norm = m.hf.get_submodule(m.layers[1].path).post_attention_layernorm
    monkeypatch.setattr(norm, "forward", lambda x: type(norm).forward(norm, x + torch.zeros(IDS.shape[1], 1)))
    found = replay(m, IDS, [Zero("L0.resid_pre@3")], LOGIT)
    assert found.how.startswith("plain: its layers do not take packed rows: RuntimeError: The size of tensor")


def test_plain_on_request_and_replay_on_request() -> None:
    assert replay(model(), IDS, [Zero("L0.attn.z[0]")], LOGIT, plain=True).how == "plain: asked for"
    with pytest.raises(UnsupportedError, match="does not go through transformers' attention interface"):
        replay(model("BloomForCausalLM"), IDS, [Zero("L0.resid_pre@0")], LOGIT, plain=False)


@pytest.mark.parametrize("site", ["L0.attn.pattern[0]", "L1.mlp.in", "embed", "final_norm"])
def test_other_sites_take_the_plain_path_and_say_so(site: str) -> None:
    found = replay(model(), IDS, [Zero(site)], LOGIT)
    assert found.how == f"plain: '{site}' acts on more than the residual stream of its own layer"
    assert found.values[0] != found.base


def test_training_mode_takes_the_plain_path() -> None:
    m = Model(tiny("LlamaForCausalLM").hf)
    m.anatomy()
    m.hf.train()
    assert replay(m, IDS, [Zero("L0.resid_pre@0")], LOGIT).how == "plain: the model is in training mode"


def test_runs_that_write_what_is_there_are_the_base_run() -> None:
    m = model()
    there = m.trace(IDS, want="L1.resid_pre")["L1.resid_pre"]
    found = replay(m, IDS, [Set("L1.resid_pre", there), Zero("L1.resid_pre@0")], LOGIT)
    assert found.values[0] == found.base != found.values[1]


def test_runs_after_what_is_read_are_the_base_run() -> None:
    found = replay(model(), IDS, [Zero("L0.resid_pre@5"), Zero("L0.resid_pre@2")], Metric("logit", (5,), 3))
    assert found.values[0] == found.base != found.values[1]


def test_no_runs() -> None:
    assert replay(model(), IDS, [], LOGIT).values.shape == (0,)


def test_bad_runs_name_what_is_wrong() -> None:
    with pytest.raises(SiteRangeError, match="layer 9"):
        replay(model(), IDS, [Zero("L9.resid_pre")], LOGIT)
    with pytest.raises(SiteRangeError, match="position 8"):
        replay(model(), IDS, [Zero("L0.resid_pre@8")], LOGIT)
    with pytest.raises(SiteSyntaxError, match="names 3 layers"):
        replay(model(), IDS, [Zero("L*.resid_pre")], LOGIT)
    with pytest.raises(InputError, match="2 rows"):
        replay(model(), IDS.repeat(2, 1), [Zero("L0.resid_pre")], LOGIT)
    with pytest.raises(InterventionError, match="NaN"):
        replay(model(), IDS, [Set("L0.resid_pre", float("nan"))], LOGIT)
    with pytest.raises(InterventionError, match=r"\[3\]"):
        replay(model(), IDS, [Set("L0.resid_pre@7", torch.zeros(3))], Metric("logit", (5,), 2))
    with pytest.raises(InputError, match="no intervention"):
        replay(model(), IDS, [[Zero("L0.resid_pre")], []], LOGIT)
    with pytest.raises(SiteRangeError, match="layer 9"):
        replay(model(), IDS, [[Zero("L0.resid_pre"), Zero("L9.resid_pre")]], LOGIT)
    with pytest.raises(InterventionError, match=r"'L1\.attn\.k@7': the value is"):
        replay(model(), IDS, [[Zero("L0.resid_pre"), Set("L1.attn.k@7", torch.zeros(3))]], LOGIT)


def test_interventions_of_a_run_are_told_what_they_are_told_in_a_plain_run() -> None:
    told: list[tuple[object, ...]] = []

    def note(x: torch.Tensor, where: Where) -> torch.Tensor:
        told.append((str(where.site), where.axes, where.real, where.chunk, tuple(x.shape)))
        return x * 2

    runs = [
        [Apply(site, note), Zero("L1.resid_pre@2")] for site in ("L0.mlp.act[1-3]@2", "L2.attn.v[0]", "L1.attn.out")
    ]
    replay(model(), IDS, [[Zero(item.at) for item in run] for run in runs], LOGIT)  # the check at first use
    replay(model(), IDS, runs, LOGIT, plain=False)
    here = told.copy()
    told.clear()
    replay(model(), IDS, runs, LOGIT, plain=True)
    assert sorted(map(str, here)) == sorted(map(str, told))
    assert len(here) == 3


def test_nothing_is_drawn_when_nobody_watches(capfd: pytest.CaptureFixture[str]) -> None:
    replay(model(), IDS, [Zero("L0.resid_pre@0")], LOGIT)
    replay(model(), IDS, [Zero("L0.resid_pre@0")], LOGIT, plain=True)
    assert capfd.readouterr() == ("", "")


class Memory(TorchDispatchMode):
    """Counts the bytes of tensors alive that were made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.alive | given:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        pointer, size = storage.data_ptr(), storage.nbytes()
        self.alive.add(pointer)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, pointer, size)

    def _gone(self, pointer: int, size: int) -> None:
        self.alive.discard(pointer)
        self.now -= size


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("metric", [LOGIT, Metric("entropy")], ids=str)
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_memory_stays_below_what_was_said(name: str, metric: Metric, several: bool) -> None:
    m = model(name)
    ids = torch.randint(1, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    runs = [Zero(f"L{i}.{kind}@{p}") for i in range(3) for kind in ("resid_pre", "attn.out") for p in range(40)]
    if several:
        runs = [[a, b] for a, b in zip(runs, [*runs[120:], *runs[:120]], strict=True)]
    said = plan_memory(m, ids, runs, metric)
    with Memory() as memory:
        found = replay(m, ids, runs, metric)
    assert found.how == "replay"
    assert found.peak_estimate == said
    assert said / 8 < memory.peak <= said
    assert plan_memory(m, ids, runs, metric, budget=said // 8) < said / 2


def test_a_base_run_recorded_before_is_taken_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    m, runs = model(), [Zero("L1.attn.z[0]"), Zero("L1.attn.z[1]@2")]
    alone = replay(m, IDS, runs, LOGIT)
    base = record(m, m.inputs(IDS), ["L1.attn.out", "L1.resid_mid"])
    recorded: list[int] = []

    def count(*args: Any) -> Any:
        recorded.append(1)
        return record(*args)

    monkeypatch.setattr(import_module("cutaway.engine.replay"), "record", count)
    torch.testing.assert_close(replay(m, IDS, runs, LOGIT, base=base).values, alone.values, rtol=0, atol=0)
    assert not recorded
    other = replay(m, IDS.flip(1), runs, LOGIT, base=base)  # another prompt
    torch.testing.assert_close(other.values, replay(m, IDS.flip(1), runs, LOGIT).values, rtol=0, atol=0)
    assert replay(m, IDS, [Zero("L0.attn.z[0]")], LOGIT, base=base).how == "replay"  # another layer
    assert len(recorded) == 3
