"""The pretend accelerator raises where CUDA would, and nowhere else; what it computes is what the CPU computes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from tests.pretend import Pretend

HERE, THERE = torch.device("pretend:0"), torch.device("pretend:1")
OTHER_DEVICE = "Expected (all tensors to be on the same device|query, key, and value to have the same device type)"


def near() -> Tensor:
    """[3, 3] on the CPU."""
    return torch.linspace(-1, 1, 9).view(3, 3)


def far(place: torch.device = HERE) -> Tensor:
    """[3, 3] on the device."""
    return near().to(place)


MIXED: dict[str, Callable[[], Any]] = {
    "sum": lambda: far() + near(),
    "sum, the other way": lambda: near() + far(),
    "sum of one number, not 0-dim": lambda: far() + near()[0, :1],
    "in place": lambda: far().add_(near()),
    "in place, into the CPU's": lambda: near().add_(far()),
    "in place, into a 0-dim tensor of the CPU": lambda: torch.tensor(1.0).add_(far().sum()),
    "comparison": lambda: far() == near(),
    "equal": lambda: torch.equal(far(), near()),
    "product": lambda: far() @ near(),
    "product with a vector": lambda: far() @ near()[0],
    "linear": lambda: functional.linear(far(), near()),
    "einsum": lambda: torch.einsum("ij,jk->ik", far(), near()),
    "cat": lambda: torch.cat([far(), near()]),
    "stack": lambda: torch.stack([far(), near()]),
    "stack of 0-dim tensors": lambda: torch.stack([far().sum(), near().sum()]),
    "where, condition": lambda: torch.where(near() > 0, far(), far()),
    "where, value": lambda: torch.where(far() > 0, far(), near()),
    "masked_fill": lambda: far().masked_fill(near() > 0, 0.0),
    "embedding": lambda: functional.embedding(torch.tensor([0]), far()),
    "index_select": lambda: far().index_select(0, torch.tensor([0])),
    "gather": lambda: far().gather(0, torch.tensor([[0]])),
    "scatter": lambda: far().scatter(0, torch.tensor([[0]]), 0.0),
    "index_add_": lambda: far().index_add_(0, torch.tensor([0]), far()[:1]),
    "masked_select": lambda: torch.masked_select(far(), near() > 0),
    "assigned at an index": lambda: far().__setitem__(torch.tensor([0]), near()[:1]),
    "bucketize": lambda: torch.bucketize(far(), near()[0]),
    "attention": lambda: functional.scaled_dot_product_attention(far()[None], near()[None], far()[None]),
    "layer norm": lambda: functional.layer_norm(far(), (3,), near()[0]),
    "softmax after a mask": lambda: (far() + near()).softmax(-1),
    "two devices": lambda: far() + far(THERE),
    "two devices, 0-dim": lambda: far() + far(THERE).sum(),
    "a module left behind": lambda: nn.Linear(3, 3)(far()),
    "from numpy": lambda: far() * torch.from_numpy(np.ones((3, 3), dtype=np.float32)),
}
"""Operations with tensors of two devices."""


@pytest.mark.parametrize("name", MIXED)
def test_devices_do_not_mix(name: str) -> None:
    with pytest.raises(RuntimeError, match=OTHER_DEVICE):
        MIXED[name]()


def assigned(x: Tensor, at: Any, value: Any) -> Tensor:
    """``x`` with a value set."""
    x[at] = value
    return x


ALLOWED: dict[str, Callable[[Callable[[], Tensor]], Any]] = {
    "a 0-dim tensor of the CPU for a number": lambda x: x() * torch.tensor(2.0) + torch.tensor(1.0),
    "a 0-dim tensor first": lambda x: torch.tensor(2.0) - x(),
    "0-dim in where": lambda x: torch.where(x() > 0, x(), torch.tensor(0.0)),
    "0-dim in masked_fill": lambda x: x().masked_fill(x() > 0, torch.tensor(5.0)),
    "0-dim in place": lambda x: x().mul_(torch.tensor(2.0)),
    "an index of the CPU": lambda x: x()[torch.tensor([2, 0])],
    "a mask of the CPU": lambda x: x()[near() > 0],
    "a number at an index of the CPU": lambda x: assigned(x(), torch.tensor([0, 2]), torch.tensor(7.0)),
    "rows of the CPU by slice": lambda x: assigned(x(), slice(0, 2), near()[1:]),
    "copy_": lambda x: x().copy_(near().T),
    "into the CPU by slice": lambda x: assigned(near(), slice(0, 2), x()[1:]),
    "type_as": lambda x: x().type_as(near()) + near(),
    "expand_as": lambda x: x()[:1].expand_as(near()),
    "double": lambda x: x().double() / 3,
    "factories": lambda x: x() + torch.ones(3, device=x().device) + torch.arange(3, device=x().device),
    "factories alike": lambda x: x().new_full((3, 3), 2.0) + torch.zeros_like(x()) + torch.eye(3, device=x().device),
    "from a list": lambda x: torch.tensor([[1.0, 2, 3]], device=x().device) @ x(),
    "from numbers of the device": lambda x: torch.tensor([x()[0, 0], x()[1, 1]]),
    "a view written to": lambda x: (y := x(), y[0].fill_(3.0), y.T[1].mul_(2.0))[0],
    "a shape changed in place": lambda x: x().unsqueeze_(0).transpose_(1, 2),
    "nonzero": lambda x: (x() > 0).nonzero(),
    "attention": lambda x: functional.scaled_dot_product_attention(x()[None, None], x()[None, None], x()[None, None]),
    "complex indexing": lambda x: x()[torch.arange(3, device=x().device)[:, None], torch.arange(2, device=x().device)],
}
"""What CUDA allows: functions of the way to make the tensor."""


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_allows_gives_what_the_cpu_gives(name: str) -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found, expected = ALLOWED[name](far), ALLOWED[name](near)
    assert isinstance(found, Pretend) or name in ("into the CPU by slice", "type_as", "from numbers of the device")
    assert found.shape == expected.shape
    assert found.stride() == expected.stride()
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("of", [near, lambda: far(THERE)])
def test_an_index_of_a_device_does_not_index_elsewhere(of: Callable[[], Tensor]) -> None:
    index = torch.tensor([0], device=HERE)
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        of()[index]
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        of()[index] = 1.0


def test_numpy_is_for_the_cpu() -> None:
    for way in (Tensor.cpu, lambda x: x.to("cpu"), lambda x: x.detach().cpu()):
        assert np.array_equal(way(far()).numpy(), near().numpy())
    for way in (lambda x: x.numpy(), np.asarray, lambda x: np.array([x[0, 0]])):
        with pytest.raises(TypeError, match="can't convert pretend:0 device type tensor to numpy"):
            way(far())


def test_numbers_come_out() -> None:
    x = far()
    assert x.tolist() == near().tolist()
    assert [x[0, 0].item(), float(x[0, 1]), int(x.argmax()), bool(x.any())] == [-1.0, -0.75, 8, True]
    assert f"{x[0, 0]:.2f}" == "-1.00"
    assert "pretend:0" in repr(x)


def test_tensors_say_where_they_are_and_share_memory_as_they_would() -> None:
    x = far()
    assert (x.device, far(THERE).device, torch.ones(1, device="pretend").device) == (HERE, THERE, HERE)
    assert (x.is_cuda, x.is_cpu, x.cpu().device.type) == (False, False, "cpu")
    assert x[1:].untyped_storage().data_ptr() == x.untyped_storage().data_ptr() != far().untyped_storage().data_ptr()
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(1, device="pretend:2")


def test_nothing_chooses_the_device_by_itself() -> None:
    assert (torch.accelerator.is_available(), torch.accelerator.device_count()) == (False, 0)
    state = torch.pretend.get_rng_state()  # type: ignore[attr-defined]
    with torch.random.fork_rng():  # warns where there are several accelerators
        torch.rand(1, device=HERE)
    assert not torch.equal(torch.pretend.get_rng_state(), state)  # type: ignore[attr-defined]


DRAWS: dict[str, Callable[..., Tensor]] = {
    "rand": lambda **given: torch.rand(64, **given),
    "randn": lambda **given: torch.randn(64, **given),
    "randint": lambda **given: torch.randint(1000, (64,), **given),
    "randperm": lambda **given: torch.randperm(64, **given),
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_the_devices_own(name: str) -> None:
    with pytest.raises(RuntimeError, match="Expected a 'pretend' device type for generator but found 'cpu'"):
        DRAWS[name](device=HERE, generator=torch.Generator())
    torch.manual_seed(0)
    first = DRAWS[name](device=HERE).cpu()
    before = torch.get_rng_state()
    assert not torch.equal(first, DRAWS[name]())
    torch.manual_seed(0)
    assert torch.equal(DRAWS[name](device=HERE).cpu(), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_draws_on_the_device() -> None:
    with pytest.raises(RuntimeError, match="for generator"):
        far().bernoulli_(0.5, generator=torch.Generator())
    state = torch.pretend.get_rng_state()  # type: ignore[attr-defined]
    ones = torch.ones(64, device=HERE)
    first = functional.dropout(ones).cpu()
    with torch.random.fork_rng([HERE], device_type="pretend"):
        assert not torch.equal(functional.dropout(ones).cpu(), first)
    torch.pretend.set_rng_state(state)  # type: ignore[attr-defined]
    assert torch.equal(functional.dropout(ones).cpu(), first)


def test_products_of_integers_are_not_there_and_their_histograms_are() -> None:
    whole = torch.arange(4, device=HERE).view(2, 2)
    with pytest.raises(NotImplementedError, match='"mm_cuda" not implemented'):
        whole @ whole
    with pytest.raises(NotImplementedError, match='"bmm_cuda" not implemented'):
        torch.einsum("bij,bjk->bik", whole[None], whole[None])
    assert torch.histc(whole.flatten(), bins=4, min=0, max=3).tolist() == [1, 1, 1, 1]


def small() -> nn.Module:
    """A network with what models are made of."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))


def test_gradients_are_the_cpus_and_come_from_another_thread() -> None:
    threads = set()
    grads = []
    for place in (torch.device("cpu"), HERE):
        hf, ids = small().to(place), torch.tensor([[1, 2, 3]], device=place)
        loss = hf(ids).log_softmax(-1)[0, -1, 0]
        if place == HERE:
            loss.register_hook(lambda _: threads.add(threading.get_ident()))
        loss.backward()
        grads.append({name: p.grad.cpu() for name, p in hf.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() == dict(small().named_parameters()).keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert threads
    assert threading.get_ident() not in threads


def test_modules_move_convert_copy_and_save(tmp_path: Path) -> None:
    hf = small()
    plain = {name: w.clone() for name, w in hf.state_dict().items()}
    moved = hf.to(HERE)
    assert all(isinstance(p, nn.Parameter) and p.device == HERE and p.requires_grad for p in moved.parameters())
    copied = copy.deepcopy(moved)
    assert all(p.device == HERE and isinstance(p, nn.Parameter) for p in copied.parameters())
    next(moved.parameters()).data[0] += 1
    assert torch.equal(next(copied.parameters()).detach().cpu(), next(iter(plain.values())))
    assert {p.dtype for p in copied.bfloat16().parameters()} == {torch.bfloat16}
    assert copied(torch.tensor([1], device=HERE)).dtype == torch.bfloat16
    save_file({name: w.cpu() for name, w in moved.state_dict().items()}, tmp_path / "weights.safetensors")
    assert load_file(tmp_path / "weights.safetensors").keys() == plain.keys()
    assert all(p.device.type == "cpu" for p in moved.to("cpu").parameters())
