"""Choose edges by their scores, drop those that lead nowhere, and draw random ones of the same profile."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from cutaway.ops.wiring import EMBED, Wiring

By = Literal["size", "support"]


def strengths(scores: np.ndarray, by: By) -> np.ndarray:
    """[edge] what edges are ranked by: the size of their score, or how much corrupting them lowers the measure."""
    return np.abs(scores) if by == "size" else -scores


def ranked(strength: np.ndarray) -> np.ndarray:
    """[edge] edges from the strongest to the weakest; those that were not scored (NaN) are left out."""
    order = np.argsort(-strength, kind="stable")
    return np.asarray(order[~np.isnan(strength[order])])


def greedy(wiring: Wiring, strength: np.ndarray, n: int) -> np.ndarray:
    """Numbers of up to n edges, each the strongest of those that lead to what is there already: first to the logits."""
    sender, receiver = wiring.edges
    into: dict[int, list[int]] = defaultdict(list)  # edges by what is computed from them; -1 the logits
    for edge in ranked(strength):
        fed = wiring.receivers[receiver[edge]].feeds or (-1,)
        for each in fed:
            into[each].append(int(edge))
    heap = [(-float(strength[e]), e) for e in into[-1]]
    heapq.heapify(heap)
    reached, chosen = {-1, 0}, list[int]()
    taken: set[int] = set()
    while heap and len(chosen) < n:
        _, edge = heapq.heappop(heap)
        if edge in taken:
            continue
        taken.add(edge)
        chosen.append(edge)
        source = int(sender[edge])
        if source not in reached:
            reached.add(source)
            for e in into[source]:
                if e not in taken:
                    heapq.heappush(heap, (-float(strength[e]), e))
    return np.array(chosen, dtype=np.int64)


def pruned(wiring: Wiring, edges: np.ndarray) -> np.ndarray:
    """The edges, in their order, that lie on a path from the embedding to the logits."""
    sender, receiver = wiring.edges
    kept = np.asarray(edges, dtype=np.int64)
    while True:
        fed = {s for e in kept for s in wiring.receivers[receiver[e]].feeds} | {wiring.senders.index(EMBED)}
        heard = {int(sender[e]) for e in kept}
        alive = np.array(
            [
                sender[e] in fed and (not (f := wiring.receivers[receiver[e]].feeds) or any(s in heard for s in f))
                for e in kept
            ],
            dtype=bool,
        )
        if alive.all():
            return kept
        kept = kept[alive]


def mask(wiring: Wiring, edges: np.ndarray) -> torch.Tensor:
    """[sender, receiver] booleans of some edges."""
    found = np.zeros(wiring.real.shape, dtype=bool)
    sender, receiver = wiring.edges
    found[sender[edges], receiver[edges]] = True
    return torch.from_numpy(found)


class EdgeDraws:
    """Random edges of the same profile as given ones: as many from the same layer and kind of sender into the same
    layer and kind of receiver."""

    def __init__(self, wiring: Wiring, seed: int) -> None:
        sender, receiver = wiring.edges
        kinds = [name.partition("[")[0] for name in wiring.senders]
        self.n = len(wiring)
        self.profile = [
            (kinds[s], wiring.receivers[r].layer, wiring.receivers[r].into or wiring.receivers[r].node)
            for s, r in zip(sender, receiver, strict=True)
        ]
        self.buckets: dict[tuple[str, int, str], list[int]] = defaultdict(list)
        for edge, key in enumerate(self.profile):
            self.buckets[key].append(edge)
        self.random = np.random.default_rng(seed)

    def draw(self, edges: Sequence[int] | np.ndarray, others: bool) -> np.ndarray:
        """As many edges of the same profile; with ``others`` none of those given, as long as others are left."""
        wanted: dict[tuple[str, int, str], int] = defaultdict(int)
        for edge in edges:
            wanted[self.profile[edge]] += 1
        given = {int(e) for e in edges} if others else set()
        drawn: list[int] = []
        short = 0
        for key, count in wanted.items():
            pool = [e for e in self.buckets[key] if e not in given]
            some = self.random.choice(len(pool), min(count, len(pool)), replace=False) if pool else np.empty(0, int)
            drawn += [pool[int(i)] for i in some]
            short += count - len(some)
        if short:
            rest = [e for e in range(self.n) if e not in given and e not in set(drawn)]
            drawn += [rest[int(i)] for i in self.random.choice(len(rest), min(short, len(rest)), replace=False)]
        return np.array(drawn, dtype=np.int64)
