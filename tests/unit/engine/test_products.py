"""Faster ways to the same numbers: chosen by measuring, equal to torch's own, and gone afterwards."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2CLS, ACT2FN
from transformers.pytorch_utils import Conv1D

from cutaway.core.intervention import Zero
from cutaway.core.metric import Metric
from cutaway.engine import products, replay
from cutaway.engine.products import better_product, fast_activations, fast_products, fused, onednn
from cutaway.models.handle import Model

FLOAT = torch.float32
CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def slow(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    functional.linear(x, weight, bias)
    return functional.linear(x, weight, bias)


def wrong(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias) * 1.001


def absent(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._there_is_no_such_operator(x, weight, bias)
    return out


def test_the_faster_of_two_equal_products_is_taken() -> None:
    assert better_product(functional.linear, own=slow)
    assert not better_product(slow)
    assert not better_product(wrong, own=slow)
    assert not better_product(absent, own=slow)


def test_onednn_is_not_taken_where_torch_has_no_such_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn", absent)
    products.chosen_product.cache_clear()
    assert products.chosen_product(1) is None
    products.chosen_product.cache_clear()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """The shapes of the matrices that went through a product put in place of torch's own."""
    seen: list[tuple[int, int]] = []

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append((weight.shape[1], weight.shape[0]))
        return x @ weight.T if bias is None else x @ weight.T + bias

    monkeypatch.setattr(products, "chosen_product", lambda threads: product)
    yield seen
    assert not _get_current_function_mode_stack()


def test_both_kinds_of_linear_modules_are_served(counted: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 256)
    modules = [nn.Linear(256, 320), nn.Linear(256, 320, bias=False), Conv1D(320, 256)]
    with torch.no_grad():
        exact = [module(x) for module in modules]
        with fast_products(CPU, FLOAT):
            found = [module(x) for module in modules]
    assert counted == [(256, 320)] * 3
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def test_what_is_not_served_runs_as_it_would(counted: list[tuple[int, int]]) -> None:
    x = torch.randn(3, 256)
    with fast_products(CPU, FLOAT):
        nn.Linear(256, 320)(x)  # a gradient may be asked for
        with torch.no_grad():
            nn.Linear(16, 32)(torch.randn(3, 16))
            nn.Linear(256, 320, dtype=torch.float64)(x.double())
            nn.Linear(256, 320)(x[:0])
            torch.addmm(torch.zeros(3, 320), x, torch.randn(256, 320))
    with fast_products(CPU, torch.bfloat16), torch.no_grad():
        nn.Linear(256, 320)(x)
    assert not counted


@pytest.mark.parametrize("threads", [1, 2])
def test_onednn_gives_what_torch_gives(threads: int) -> None:
    """Where this torch has the operator; where it has not, that is found out before it is used."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        assert not better_product(onednn)
        return
    draw = torch.Generator().manual_seed(threads)
    x, weight, bias = (torch.randn(*size, generator=draw) for size in ((2, 37, 256), (320, 256), (320,)))
    for w in (weight, weight.T.contiguous().T):
        for b in (bias, None):
            exact = functional.linear(x.double(), w.double(), None if b is None else b.double())
            found = onednn(x, w, b)
            assert float((found - exact).abs().max()) <= 1e-5 * float(exact.abs().max())


def wide(name: str) -> Model:
    """Small models whose matrices are large enough to be served."""
    torch.manual_seed(0)
    if name == "gpt2":
        return Model(GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=2, n_head=4, vocab_size=64)).eval())
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    return Model(LlamaForCausalLM(config).eval())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_replay_through_another_product_equals_plain_runs(name: str, counted: list[tuple[int, int]]) -> None:
    model = wide(name)
    runs = [Zero(f"L{i}.{kind}@{p}") for i in range(2) for kind in ("resid_pre", "attn.z") for p in (0, 3, 5)]
    found = replay(model, IDS, runs, Metric("logit", (5,)), plain=False)
    assert (256, 1024 if name == "gpt2" else 512) in counted
    count = len(counted)
    plain = replay(model, IDS, runs, Metric("logit", (5,)), plain=True)
    assert len(counted) == count
    torch.testing.assert_close(found.values, plain.values, rtol=0, atol=1e-5 * float(plain.values.abs().max()))


@pytest.mark.parametrize("product", [onednn, None])
def test_replay_equals_plain_runs_whichever_product_is_chosen(product: object, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        product = None
    monkeypatch.setattr(products, "chosen_product", lambda threads: product)
    model = wide("gpt2")
    runs = [Zero(f"L{i}.mlp.out@{p}") for i in range(2) for p in (0, 3, 5)]
    found = replay(model, IDS, runs, Metric("logit", (5,)), plain=False)
    plain = replay(model, IDS, runs, Metric("logit", (5,)), plain=True)
    torch.testing.assert_close(found.values, plain.values, rtol=0, atol=1e-5 * float(plain.values.abs().max()))


@pytest.mark.parametrize("name", sorted(ACT2CLS))
def test_an_activation_in_one_call_gives_what_its_class_gives(name: str) -> None:
    module = ACT2FN[name]
    function = fused(type(module))
    if name in ("gelu_new", "gelu_fast", "gelu_accurate"):
        assert function is not None
    if function is not None:
        x = torch.linspace(-20, 20, 10007)
        torch.testing.assert_close(function(x), module(x), rtol=0, atol=2e-5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = ACT2FN["gelu_new"]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(x)
        return out


def test_activations_are_taken_in_one_call_by_this_thread_only() -> None:
    block, x = Block(), torch.randn(8, 16)
    exact, found = block(x), []
    with fast_activations(block):
        here = block(x)
        other = threading.Thread(target=lambda: found.append(block(x)))
        other.start()
        other.join()
    assert torch.equal(here, functional.gelu(x, approximate="tanh"))
    assert torch.equal(found[0], exact)
    assert torch.equal(block(x), exact)
    assert not block.act._forward_hooks
    assert not block.act._forward_pre_hooks


def test_an_activation_that_someone_hooked_is_left_alone() -> None:
    block, x, seen = Block(), torch.randn(8, 16), []
    handle = block.act.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    with fast_activations(block):
        found = block(x)
    handle.remove()
    assert seen == [8]
    assert torch.equal(found, block(x))
