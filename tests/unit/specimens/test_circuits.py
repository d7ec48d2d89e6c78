"""The hand-wired circuits use the heads on their cards, every one of them and no other; the game is its game."""

import numpy as np
import pytest
import torch

from cutaway import specimens
from cutaway.specimens.exam import answers, load_plain
from recipes import circuit, game

CIRCUITS = ("circuit-induction", "circuit-ioi")
SIZE = circuit.WIDTH // circuit.HEADS


@pytest.fixture(scope="module", params=CIRCUITS)
def wired(request):
    return (*load_plain(specimens.path(request.param), "causal-lm"), specimens.card(request.param))


def share_right(model, tokenizer, card, zeroed):
    """Share of answers with some heads silent; (layer, head) pairs."""
    handles = []
    for layer, head in zeroed:

        def hook(_, args, head=head):
            x = args[0].clone()
            x[..., head * SIZE : (head + 1) * SIZE] = 0
            return (x,)

        handles.append(model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(hook))
    found = answers(model, tokenizer, card.examples)
    for handle in handles:
        handle.remove()
    return found


def named(card):
    return [(int(h[1 : h.index(".")]), int(h.split("[")[1].rstrip("]"))) for h in card.truths["heads"]]


def test_every_named_head_is_needed_and_all_others_are_not(wired):
    model, tokenizer, card = wired
    heads = named(card)
    others = [(n, h) for n in range(model.config.n_layer) for h in range(model.config.n_head) if (n, h) not in heads]
    assert share_right(model, tokenizer, card, others) == 1.0
    for head in heads:
        assert share_right(model, tokenizer, card, [head]) <= 0.5


def test_edges_join_named_heads_forwards(wired):
    _, _, card = wired
    heads = set(card.truths["heads"])
    for writer, reader, channel in card.truths["edges"]:
        assert writer in heads | {"embed"}
        assert reader in heads | {"logits"}
        assert channel in ("q", "k", "v") or reader == "logits"
        if writer in heads and reader in heads:
            assert int(writer[1]) < int(reader[1])


def test_what_is_on_no_edge_writes_nothing(wired):
    model, tokenizer, card = wired
    heads, seen = named(card), {}
    handles = [
        block.mlp.register_forward_hook(lambda _m, _a, out, n=n: seen.update({n: out}))
        for n, block in enumerate(model.transformer.h)
    ]
    with torch.no_grad():
        model(**tokenizer(card.examples[0]["prompt"], return_tensors="pt"))
    for handle in handles:
        handle.remove()
    assert all(out.abs().max() == 0 for out in seen.values())
    for n, block in enumerate(model.transformer.h):
        for h in range(model.config.n_head):
            written = block.attn.c_proj.weight[h * SIZE : (h + 1) * SIZE].abs().max()
            assert (written > 0) == ((n, h) in heads)


def test_ioi_mover_looks_at_the_name_said_once():
    model, tokenizer = load_plain(specimens.path("circuit-ioi"), "causal-lm")
    model.set_attn_implementation("eager")
    text = "When Ada and Bea went home , Bea gave a drink to"
    with torch.no_grad():
        attention = model(**tokenizer(text, return_tensors="pt"), output_attentions=True).attentions[2][0, 2, -1]
    assert attention[2] > 0.99  # <s> When Ada


def test_the_game_is_in_the_logits():
    model, tokenizer = load_plain(specimens.path("game"), "causal-lm")
    masks = game.GAME.masks()
    ids = tokenizer([game.prompt(m.tolist()) for m in masks], return_tensors="pt").input_ids
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[:, -1].log_softmax(-1)[:, tokenizer.convert_tokens_to_ids("yes")].double()
    odds = (log_p - torch.log1p(-log_p.exp())).numpy()
    card = specimens.card("game")
    expected = game.GAME.value(masks) - np.log(len(game.WORDS) - 1)
    np.testing.assert_allclose(odds, expected, atol=card.truths["tolerance"])
    assert card.truths["ands"] == [[list(m), w] for m, w in game.GAME.ands.items()]
