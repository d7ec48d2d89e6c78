"""Path patching against interventions written by hand with plain hooks, and on circuits whose edges are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from cutaway import catalog, specimens
from cutaway.core.errors import MismatchError, ParameterError, TokenError
from cutaway.core.inputs import Inputs
from cutaway.models.load import load
from cutaway.results import Grid
from tests.architectures import inputs, model

CLEAN, CORRUPT = [70, 71, 72, 73, 74, 75], [70, 90, 72, 93, 74, 75]
PAIRS = 50


class Places(NamedTuple):
    """Module paths: what is added to the stream by attention and by the MLP, and what the heads are written through."""

    attention: str
    mlp: str
    z: str
    inputs: Callable[[str, int], tuple[str, slice]]  # module and columns of one head's query, key or value


def separate(side: str, head: int) -> tuple[str, slice]:
    return f"model.layers.{{}}.self_attn.{side}_proj", slice(head * 16, head * 16 + 16)


def stacked(side: str, head: int) -> tuple[str, slice]:
    start = "qkv".index(side) * 64 + head * 16
    return "transformer.h.{}.attn.c_attn", slice(start, start + 16)


def interleaved(side: str, head: int) -> tuple[str, slice]:
    start = head * 48 + "qkv".index(side) * 16
    return "gpt_neox.layers.{}.attention.query_key_value", slice(start, start + 16)


LLAMA = "model.layers.{}.self_attn.o_proj"
PLACES = {
    "dense": Places(
        "transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj", "transformer.h.{}.attn.c_proj", stacked
    ),
    "grouped-query": Places(LLAMA, "model.layers.{}.mlp.down_proj", LLAMA, separate),
    "parallel": Places(
        "gpt_neox.layers.{}.attention.dense",
        "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "gpt_neox.layers.{}.attention.dense",
        interleaved,
    ),
    "sliding-softcap": Places(
        "model.layers.{}.post_attention_layernorm", "model.layers.{}.post_feedforward_layernorm", LLAMA, separate
    ),
}


@contextmanager
def hooked(name: str, **hooks: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Plain hooks: "into PATH" on a module's first argument, "out PATH" on what it gives."""
    handles = []
    for where, change in hooks.items():
        side, path = where.split(" ")
        module = model(name).hf.get_submodule(path)
        if side == "into":
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, a, change=change: None if (new := change(a[0])) is None else (new, *a[1:])
                )
            )
        else:
            handles.append(module.register_forward_hook(lambda m, a, o, change=change: change(o)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def difference(name: str, ids: list[int]) -> float:
    with torch.no_grad():
        logits = model(name).hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return float(logits[11] - logits[22])


@cache
def seen(name: str, corrupt: bool) -> dict[str, Tensor]:
    """What every place holds in one of the two runs."""
    found: dict[str, Tensor] = {}
    places = PLACES[name]

    def keep(where: str) -> Callable[[Tensor], None]:
        return lambda x: found.update({where: x.clone()})

    wheres = [f"out {p.format(i)}" for i in range(3) for p in (places.attention, places.mlp)]
    wheres += [f"into {places.z.format(i)}" for i in range(3)]
    with hooked(name, **{w: keep(w) for w in wheres}):
        difference(name, CORRUPT if corrupt else CLEAN)
    return found


def received(name: str, sender: str, receiver: str, between: str = "frozen") -> tuple[str, slice, Tensor]:
    """(module, columns, value) of what the receiver would compute if the sender alone gave what the clean run has."""
    places = PLACES[name]
    base, gives = seen(name, True), seen(name, False)
    end, side, number = int(receiver[1]), receiver[3:].split("[")[0], receiver.split("[")[-1].rstrip("]")
    start, head = int(sender[1]), sender.split("[")[-1].rstrip("]")
    caught: list[Tensor] = []

    def put(value: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: value

    def catch(x: Tensor) -> None:
        caught.append(x.clone())

    hooks: dict[str, Callable[[Tensor], Tensor | None]] = {}
    for i in range(end + 1):
        attention, mlp = f"out {places.attention.format(i)}", f"out {places.mlp.format(i)}"
        if between != "recomputed" and not (i == start and "attn" in sender):
            hooks[attention] = put(base[attention])
        if between == "frozen" and not (i == end and side == "mlp.in"):
            hooks[mlp] = put(base[mlp])
        if i == start and "mlp" in sender:
            hooks[mlp] = put(gives[mlp])
    if "attn" in sender:
        z = f"into {places.z.format(start)}"
        own = slice(int(head) * 16, int(head) * 16 + 16)

        def patched(x: Tensor) -> Tensor:
            new = (x if between == "recomputed" else base[z]).clone()
            new[..., own] = gives[z][..., own]
            return new

        hooks[z] = patched
    if side == "mlp.in":
        path, columns = places.mlp.format(end), slice(None)
    else:
        path, columns = places.inputs(side[-1], int(number))
        path = path.format(end)
    hooks[f"out {path}"] = catch
    with hooked(name, **hooks):
        difference(name, CORRUPT)
    return path, columns, caught[-1][..., columns]


def by_hand(name: str, sender: str, receivers: list[str], between: str = "frozen") -> float:
    """The change of the metric when the receivers are given what the sender makes of them."""
    found = [received(name, sender, receiver, between) for receiver in receivers]

    def put(path: str) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            new = x.clone()
            for where, columns, value in found:
                if where == path:
                    new[..., columns] = value
            return new

        return change

    with hooked(name, **{f"out {path}": put(path) for path in dict.fromkeys(path for path, _, _ in found)}):
        value = difference(name, CORRUPT)
    return value - difference(name, CORRUPT)


def patched(of: Any, receivers: str, **params: Any) -> Grid:
    given = {"clean": CLEAN, "corrupt": CORRUPT, "metric": "logit_diff: #11, #22", "normalise": False, **params}
    found = catalog.run("path_patching", of, receivers=receivers, **given)
    assert isinstance(found, Grid)
    assert found.check is not None
    assert found.check.holds, str(found.check)
    return found


@pytest.mark.parametrize("name", PLACES)
def test_random_paths_are_what_hooks_written_by_hand_measure(name: str) -> None:
    found = patched(model(name), "L*.attn.q, L*.attn.k, L*.attn.v, L*.mlp.in", senders="heads and mlps", each=True)
    senders, receivers = found.labels["sender"], found.labels["receiver"]
    assert len(receivers) == 3 * (4 + 2 * model(name).layers[0].attention.kv_heads + 1)
    pairs = np.argwhere(~np.isnan(found.values))
    assert len(pairs) > 2 * PAIRS
    sizes = []
    for i, j in np.random.default_rng(0).permutation(pairs)[:PAIRS]:
        exact = by_hand(name, str(senders[i]), [str(receivers[j])])
        assert found.values[i, j] == pytest.approx(exact, abs=1e-5), (senders[i], receivers[j])
        sizes.append(abs(exact))
    assert np.median(sizes) > 1e-3  # they are effects, not nothing


@pytest.mark.parametrize("between", ["mlps", "recomputed"])
@pytest.mark.parametrize("name", ["dense", "parallel", "sliding-softcap"])
def test_what_lies_between_may_be_computed_again(name: str, between: str) -> None:
    receivers = "L2.attn.k[1], L2.attn.q[0], L1.mlp.in"
    found = patched(model(name), receivers, senders="heads and mlps", between=between, each=True)
    frozen = patched(model(name), receivers, senders="heads and mlps", each=True)
    for i, j in np.argwhere(~np.isnan(found.values))[::2]:
        sender, receiver = str(found.labels["sender"][i]), str(found.labels["receiver"][j])
        assert found.values[i, j] == pytest.approx(by_hand(name, sender, [receiver], between), abs=1e-5)
    assert np.nanmax(np.abs(found.values - frozen.values)) > 1e-3


@pytest.mark.parametrize("name", PLACES)
def test_receivers_together_are_changed_in_one_run(name: str) -> None:
    receivers = ["L1.attn.v[1]", "L2.attn.q[3]", "L2.mlp.in"]
    found = patched(model(name), ", ".join(receivers))
    assert found.axes == ("layer", "head")
    for layer in range(3):
        for head in range(4):
            sender = f"L{layer}.attn.z[{head}]"
            later = [r for r in receivers if int(r[1]) > layer or (r[1] == "2" == sender[1] and "mlp" in r)]
            later = [r for r in later if not (name == "parallel" and r[1] == sender[1])]
            value = found.values[layer, head]
            if later:
                assert value == pytest.approx(by_hand(name, sender, later), abs=1e-5)
            else:
                assert np.isnan(value)


@pytest.mark.parametrize("name", ["dense", "sliding-softcap", "experts", "no-interface", "sinks", "post-norm"])
def test_all_paths_to_the_logits_and_all_of_the_embedding(name: str) -> None:
    of = model(name)
    low, high = (float(x[11] - x[22]) for x in (of([ids])[0, -1] for ids in (CORRUPT, CLEAN)))
    found = patched(of, "final_norm", senders="all", between="recomputed")
    assert found.axes == ("layer", "component")
    assert found.labels["component"] == (0, 1, 2, 3, "mlp", "embed")
    assert found.values[0, -1] == pytest.approx(high - low, abs=1e-4)  # the embedding, along every path
    assert np.isnan(found.values[1:, -1]).all()
    exact = catalog.run(
        "patch",
        of,
        clean=CLEAN,
        corrupt=CORRUPT,
        metric="logit_diff: #11, #22",
        kind="attn.z",
        by="head",
        normalise=False,
    )
    np.testing.assert_allclose(found.values[:, :4], exact.values - low, atol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen-vl"])
def test_images_too(name: str) -> None:
    clean, corrupt = inputs(name), inputs(name, seed=3)
    found = patched(model(name), "L2.attn.v", clean=clean, corrupt=corrupt, positions="image")
    whole = patched(model(name), "L2.attn.v", clean=clean, corrupt=corrupt)
    assert np.nanmax(np.abs(found.values)) > 1e-3
    assert np.nanmax(np.abs(found.values - whole.values)) > 1e-4


def test_positions_of_senders_and_of_receivers_count() -> None:
    of = model("grouped-query")
    last = patched(of, "L2.attn.q@-1")
    whole = patched(of, "L2.attn.q")
    assert np.nanmax(np.abs(last.values - whole.values)) < 1e-5  # the answer is read where the last query looks from
    first = patched(of, "L2.attn.q", positions="0")
    assert np.nanmax(np.abs(first.values)) < 1e-5  # nothing differs there


def edges(name: str) -> list[tuple[str, str]]:
    """The card's edges as (sender, receiver) of path patching."""
    found = []
    for writer, reader, side in specimens.card(name).truths["edges"]:
        end = "final_norm" if reader == "logits" else reader.replace("attn.z", f"attn.{side}")
        found.append((writer, end))
    return found


def placed(of: Any, prompt: str, seed: int | None) -> Inputs:
    """A prompt whose words stand where they stand, or (with a seed) at each other's positions."""
    plain = of.inputs(prompt)
    n = plain.ids.shape[1]
    order = torch.arange(n) if seed is None else torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return of.inputs({"input_ids": plain.ids, "attention_mask": plain.mask, "position_ids": order[None]})


IOI = "When Ada and Bea went home saw a book , Bea gave a drink to"


def pairs(name: str, of: Any) -> list[tuple[Any, Any]]:
    """(clean, corrupt) prompts that differ in one word, or in where words stand."""
    if name == "circuit-ioi":
        words = IOI.split()
        swaps = ((10, "Ada"), (14, "drink"), (1, "Fay"), (1, "home"), (3, "Fay"), (10, "Fay"))
        # A head that no longer looks anywhere looks everywhere: the fewer words, the more that matters.
        short = ("Ada Bea Bea to", "Ada Bea Bea drink")
        return [*((" ".join([*words[:i], w, *words[i + 1 :]]), IOI) for i, w in swaps), short]
    found: list[tuple[Any, Any]] = []
    for prompt in ("f m d k b i k", "k b i p g n e l k"):
        words = prompt.split()
        found += [(" ".join([*words[:i], "j", *words[i + 1 :]]), prompt) for i in range(len(words))]
        found += [(placed(of, prompt, seed), placed(of, prompt, None)) for seed in range(3)]
    return found


@pytest.mark.parametrize(
    ("name", "metric"), [("circuit-induction", "logit: b"), ("circuit-ioi", "logit_diff: Ada, Bea")]
)
def test_the_edges_of_a_known_circuit_are_the_strongest_paths(name: str, metric: str) -> None:
    """Each edge carries the answer in one of the pairs.

    Norms let other paths act on how large logits are, by a tenth of the answer: the weakest edge is above that.
    """
    of, true, largest = load(name), set(edges(name)), np.zeros(())
    for clean, corrupt in pairs(name, of):
        found = catalog.run(
            "path_patching",
            of,
            clean=clean,
            corrupt=corrupt,
            receivers="L*.attn.q, L*.attn.k, L*.attn.v, L*.mlp.in, final_norm",
            metric=metric,
            senders="all",
            each=True,
            normalise=False,
            draws=0,
        )
        largest = np.maximum(largest, np.nan_to_num(np.abs(found.values)))
    senders, receivers = found.labels["sender"], found.labels["receiver"]
    order = np.argsort(-largest, axis=None)
    top = [np.unravel_index(n, largest.shape) for n in order[: len(true)]]
    assert {(senders[i], receivers[j]) for i, j in top} == true
    assert largest.flat[order[len(true) - 1]] > 1.2 * largest.flat[order[len(true)]]


@pytest.mark.parametrize("direction", ["clean->corrupt", "corrupt->clean"])
def test_the_strongest_senders_beat_random_ones(direction: str) -> None:
    found = catalog.run(
        "path_patching",
        load("circuit-induction"),
        clean="f m d k b i k",
        corrupt="f m k d b i k",
        receivers="L1.attn.k[1]",
        direction=direction,
        draws=8,
    )
    assert found.values[0].argmax() == 0
    assert found.values[0, 0] == pytest.approx(1 if direction == "clean->corrupt" else 0.5, abs=0.01)
    assert np.isnan(found.values[1]).all()
    assert found.proof is not None
    assert found.proof.holds, str(found.proof)
    assert "logit_diff" in found.notes[0]


@pytest.mark.parametrize(
    ("params", "error", "sentence"),
    [
        ({"corrupt": [70, 90, 72]}, MismatchError, "row 0 has 6 and 3 tokens, first different at position 1"),
        ({"corrupt": CLEAN}, MismatchError, "they are the same"),
        ({"metric": "logit_diff: #11, #22 @0", "normalise": True}, ParameterError, "both runs give"),
        ({"metric": "logit_diff: #11, #999999"}, TokenError, "999999"),
        ({"receivers": "L1.attn.z[0]"}, ParameterError, "a path ends in the queries"),
        ({"receivers": "L1.attn.w"}, LookupError, "there is no kind 'attn.w'"),
        (
            {"receivers": "logits"},
            LookupError,
            "no kind 'logits'; they are no site; what they are read from is 'final_",
        ),
        ({"receivers": "L7.attn.q"}, LookupError, "layer 7 is not there"),
        ({"receivers": "L1.attn.k[3]"}, LookupError, "kv_head 3 is not there: the valid kv_heads are 0-1"),
        ({"receivers": "L1.attn.q@9"}, LookupError, "position 9 is not there"),
        ({"receivers": "L0.attn.q"}, ParameterError, "none of 12 senders comes before L0.attn.q"),
        ({"positions": "8"}, LookupError, "position 8 is not there"),
        ({"draws": 2}, ParameterError, "give at least 5, or 0"),
    ],
)
def test_what_cannot_be_patched_says_why(params: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        patched(model("grouped-query"), **{"receivers": "L1.attn.q", **params})
