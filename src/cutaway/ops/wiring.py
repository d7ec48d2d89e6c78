"""Who can write to whom: the edges of a model's computation, from what writes the residual stream to what reads it.

Senders are the input embedding, every head and every MLP. Receivers are the queries of every head, the keys and values
of every key-value head, every MLP, and the logits. Each reads all that was added to the residual stream before it.
Where a head's output is multiplied by a gate (Laguna), the gate reads what the head's query reads. A head's queries,
keys and values belong to the head's node; keys and values that several heads share are nodes of their own, so that
nothing is ungrouped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from cutaway.core.errors import UnsupportedError
from cutaway.ops.watched import WatchedModel

EMBED, LOGITS = "embed", "logits"
SIDES = ("q", "k", "v")


class Receiver(NamedTuple):
    """One place that reads the residual stream.

    Attributes:
        node: the node that it belongs to. into: "q", "k" or "v" of attention, "" of an MLP and the logits.
        layer: its number; of the logits the number of layers. number: of the head or key-value head; 0 else.
        reads: how many senders come before it.
        feeds: the senders that are computed from it.
    """

    node: str
    into: str
    layer: int
    number: int
    reads: int
    feeds: tuple[int, ...]


@dataclass(frozen=True)
class Wiring:
    """Senders, receivers and edges of a model.

    Attributes:
        heads, kv_heads: per layer. parallel: whether the layer's MLP reads what its attention reads.
    """

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    parallel: tuple[bool, ...]

    @staticmethod
    def of_model(model: WatchedModel, inputs: Any = None) -> Wiring:
        """The wiring of a model.

        Raises:
            UnsupportedError: a layer does not add heads and an MLP to the residual stream.
        """
        model.anatomy(inputs)
        heads, kv_heads, parallel = [], [], []
        for i, layer in enumerate(model.layers):
            kinds = ("resid_pre", "attn.out", "mlp.out", "attn.z", "attn.q", "attn.k", "attn.v")
            missing = next((kind for kind in kinds if not layer.has(kind)), None)
            why = layer.refused[missing] if missing else ""
            if layer.norms and not missing and not layer.has("resid_mid"):
                why = "it norms the sum of the stream with attention and MLP at once"
            elif not missing and not layer.w_o:
                why = "its heads are not written by one matrix that reads them as they are"
            if why:
                raise UnsupportedError(f"the edges into and out of layer {i} of {model.name}", why)
            heads.append(layer.attention.heads)
            kv_heads.append(layer.attention.kv_heads)
            parallel.append(bool(layer.parallel))
        return Wiring(tuple(heads), tuple(kv_heads), tuple(parallel))

    @staticmethod
    def from_sizes(sizes: Mapping[str, Any]) -> Wiring:
        """The wiring that ``sizes`` tells."""
        return Wiring(tuple(sizes["heads"]), tuple(sizes["kv_heads"]), tuple(sizes["parallel"]))

    @property
    def sizes(self) -> dict[str, Any]:
        """What ``from_sizes`` reads, as plain values."""
        return {"heads": self.heads, "kv_heads": self.kv_heads, "parallel": self.parallel}

    def __str__(self) -> str:
        def said(values: Sequence[int]) -> str:
            return str(values[0]) if len(set(values)) == 1 else "/".join(map(str, values))

        shared = f" ({said(self.kv_heads)} with keys and values)" if self.heads != self.kv_heads else ""
        together = ", attention and MLP side by side" if any(self.parallel) else ""
        return f"{len(self.heads)} layers of {said(self.heads)} heads{shared}{together}"

    @cached_property
    def senders(self) -> tuple[str, ...]:
        """Names of what writes the residual stream, in its order."""
        names = [EMBED]
        for i, heads in enumerate(self.heads):
            names += [*(f"L{i}.attn.z[{h}]" for h in range(heads)), f"L{i}.mlp.out"]
        return tuple(names)

    def first(self, layer: int) -> int:
        """How many senders come before a layer."""
        return 1 + sum(self.heads[:layer]) + layer

    @cached_property
    def receivers(self) -> tuple[Receiver, ...]:
        """What reads the residual stream: per layer queries, keys, values, MLP; then the logits."""
        found: list[Receiver] = []
        for i, (heads, groups) in enumerate(zip(self.heads, self.kv_heads, strict=True)):
            first, share = self.first(i), heads // groups
            for h in range(heads):
                found.append(Receiver(f"L{i}.attn.z[{h}]", "q", i, h, first, (first + h,)))
            for side in ("k", "v"):
                for g in range(groups):
                    node = f"L{i}.attn.z[{g}]" if share == 1 else f"L{i}.attn.{side}[{g}]"
                    fed = tuple(range(first + g * share, first + (g + 1) * share))
                    found.append(Receiver(node, side, i, g, first, fed))
            reads = first if self.parallel[i] else first + heads
            found.append(Receiver(f"L{i}.mlp.out", "", i, 0, reads, (first + heads,)))
        n = len(self.senders)
        return (*found, Receiver(LOGITS, "", len(self.heads), 0, n, ()))

    def block(self, layer: int) -> range:
        """Numbers of the receivers of a layer's attention: queries, keys, values; the MLP's comes next."""
        start = sum(h + 2 * g + 1 for h, g in zip(self.heads[:layer], self.kv_heads[:layer], strict=True))
        return range(start, start + self.heads[layer] + 2 * self.kv_heads[layer])

    def side(self, layer: int, side: str) -> range:
        """Numbers of the receivers that are queries ("q"), keys ("k") or values ("v") of a layer, head by head."""
        start, heads, groups = self.block(layer).start, self.heads[layer], self.kv_heads[layer]
        first = start + {"q": 0, "k": heads, "v": heads + groups}[side]
        return range(first, first + (heads if side == "q" else groups))

    @cached_property
    def real(self) -> np.ndarray:
        """[sender, receiver] whether the receiver reads the sender."""
        reads = np.array([r.reads for r in self.receivers])
        return np.asarray(np.arange(len(self.senders))[:, None] < reads[None, :])

    @cached_property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """(sender, receiver) of every edge [edge], receiver by receiver."""
        receiver, sender = np.nonzero(self.real.T)
        return sender, receiver

    def __len__(self) -> int:
        return int(self.real.sum())

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Every node: senders, the keys and values that several heads share, and the logits, from below."""
        names = [EMBED]
        for i, (heads, groups) in enumerate(zip(self.heads, self.kv_heads, strict=True)):
            shared = [f"L{i}.attn.{side}[{g}]" for side in ("k", "v") for g in range(groups)] if heads > groups else []
            names += [*shared, *(f"L{i}.attn.z[{h}]" for h in range(heads)), f"L{i}.mlp.out"]
        return (*names, LOGITS)

    @cached_property
    def heights(self) -> np.ndarray:
        """[node] where each stands in a drawing: within a layer shared keys and values, heads, MLP."""
        rank = {"k": 1, "v": 1, "z": 2, "out": 3}
        found = []
        for name in self.nodes:
            if name in (EMBED, LOGITS):
                found.append(0 if name == EMBED else 3 * len(self.heads) + 1)
            else:
                layer, _, kind = name.partition(".")
                found.append(3 * int(layer[1:]) + rank[kind.partition("[")[0].rpartition(".")[2]])
        return np.array(found)

    @cached_property
    def ends(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source node, target node, into) of every edge [edge]."""
        at = {name: i for i, name in enumerate(self.nodes)}
        sender, receiver = self.edges
        source = np.array([at[self.senders[s]] for s in sender])
        target = np.array([at[self.receivers[r].node] for r in receiver])
        into = np.array([self.receivers[r].into for r in receiver], dtype=object)
        return source, target, into

    def numbers(self, sources: Sequence[str], targets: Sequence[str], into: Sequence[str]) -> np.ndarray:
        """[k] which edges these are; KeyError for one that is not there."""
        sender = {name: i for i, name in enumerate(self.senders)}
        receiver = {(r.node, r.into): i for i, r in enumerate(self.receivers)}
        place = np.full(self.real.shape, -1)
        place[self.edges] = np.arange(len(self))
        found = np.array(
            [place[sender[a], receiver[b, c]] for a, b, c in zip(sources, targets, into, strict=True)], dtype=np.int64
        )
        if (found < 0).any():
            i = int(np.argmax(found < 0))
            raise KeyError(f"{sources[i]} -> {targets[i]}")
        return found
