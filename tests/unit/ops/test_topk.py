"""Certified top-k is what evaluating everything gives."""

import pytest
import torch

from cutaway.ops.topk import certified_topk

CASES = [
    (seed, vocabulary, size)
    for seed, vocabulary in enumerate([100] * 15 + [1_000] * 20 + [10_000] * 10 + [50_000] * 5)
    for size in ((0.1, 1.0, 10.0)[seed % 3],)
]


@pytest.mark.parametrize(("seed", "vocabulary", "size"), CASES)
def test_pruned_is_brute_force(seed, vocabulary, size):
    """Neurons over a softmax readout, as in neuron attribution; the largest ones move logits by tens of nats."""
    g = torch.Generator().manual_seed(seed)
    n, d, k = 400, 24, 20
    head = torch.randn(vocabulary, d, generator=g)
    base = torch.randn(d, generator=g)
    vectors = torch.randn(n, d, generator=g) * size * torch.rand(n, 1, generator=g) ** 3
    token = seed % vocabulary
    z = head @ base

    def exact(index):
        moved = z + vectors[index] @ head.T
        return (moved[:, token] - moved.logsumexp(-1)) - (z[token] - z.logsumexp(-1))

    gradient = head[token] - z.softmax(-1) @ head
    brute = torch.cat([exact(part) for part in torch.arange(n).split(100)])
    found = certified_topk(vectors @ gradient, exact, k)
    expected = brute.topk(k)
    torch.testing.assert_close(found.score, expected.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(brute[found.index], expected.values, rtol=1e-5, atol=1e-5)
    assert found.total == n
    assert found.evaluated >= k


def test_it_stops_early_where_the_bound_is_tight():
    score = torch.linspace(0, 10, 10_000)
    found = certified_topk(score + 1e-3, lambda i: score[i], 10, block=16)
    assert found.index.tolist() == list(range(9999, 9989, -1))
    assert found.evaluated <= 32


def test_a_bound_that_misleads_is_followed_to_the_end():
    score = torch.arange(500.0)
    found = certified_topk(score.flip(0) + 1000, lambda i: score[i], 3)
    assert found.index.tolist() == [499, 498, 497]
    assert found.evaluated == 500


def test_fewer_than_k_and_none():
    score = torch.tensor([3.0, 1.0, 2.0])
    assert certified_topk(score, lambda i: score[i], 5).index.tolist() == [0, 2, 1]
    assert certified_topk(score[:0], lambda i: score[i], 5).score.numel() == 0
