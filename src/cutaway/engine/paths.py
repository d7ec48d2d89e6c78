"""What senders change in what receivers read, along the direct path or through what lies between.

A sender is the embedding, a head or an MLP: its output becomes what the giving run has there. A receiver is the query,
key or value of heads, the input of an MLP, or the final norm, which stands for the logits. Each receiver is given what
it would compute from the changed residual stream, and nothing else sees the change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from cutaway.core.errors import ParameterError, UnsupportedError
from cutaway.core.intervention import Add, Apply, Intervention, Set, Where
from cutaway.core.site import Items, Site
from cutaway.core.trace import Trace
from cutaway.engine.base import Base, record, why_not
from cutaway.engine.exchanges import size_of
from cutaway.engine.front import attention_inputs, mlp_outputs
from cutaway.engine.gradients import Run, observe
from cutaway.engine.patching import Exchange, part
from cutaway.engine.reduce import Reducer, close, entry, wanted
from cutaway.engine.rows import CannotReplayError
from cutaway.engine.together import ROWS
from cutaway.models.handle import Model

Between = Literal["frozen", "mlps", "recomputed"]
HEADS = ("attn.q", "attn.k", "attn.v")
FINAL = "final_norm"
Sender = Site
Some = Sequence[Sender]


def receivers_of(model: Model, sites: Sequence[Site], exchange: Exchange, each: bool = False) -> list[Site]:
    """The receivers that sites name, one layer each; ``each`` head by itself where several are named.

    Raises:
        ParameterError: a kind that is no receiver. SiteError: a layer, head or position that is not there.
    """
    found: list[Site] = []
    for site in sites:
        if site.kind not in (*HEADS, "mlp.in", FINAL) or site.scope:
            said = "a path ends in the queries, keys or values of heads, in an MLP's input, or in the final norm"
            raise ParameterError(f"receiver '{site}'", said, f"name {', '.join(HEADS)}, mlp.in or {FINAL}")
        if site.kind == FINAL:
            found.append(Site(FINAL))
            continue
        known = replace(site, kind="mlp.out") if site.kind == "mlp.in" else site  # experts have no one input
        for one in model.expand(known, exchange.receiver):
            exchange.receiver.select(one.positions, f"receiver '{site}'")
            if each and one.kind in HEADS:
                n = model.anatomy(exchange.receiver).size(one)
                heads = range(n) if one.index is None else one.index.resolve(n, "head", f"receiver '{site}'")
                found += [one.at(index=h) for h in heads]
            else:
                found.append(replace(one, kind=site.kind))
    return list(dict.fromkeys(found))


class Paths:
    """The paths from senders to receivers between the two runs of an exchange.

    Attributes:
        how: "front" where only what lies between residual stream and receivers is computed, or "rows: " and why whole
            layers run.
        base: the receiving run, for replays; None where whole layers run.
    """

    def __init__(
        self,
        model: Model,
        exchange: Exchange,
        senders: Some,
        receivers: Some,
        between: Between,
        rows: bool = False,
        gives: Run | None = None,
        gets: Base | None = None,
    ) -> None:
        self.model, self.exchange, self.between = model, exchange, between
        self.senders, self.receivers = list(senders), list(receivers)
        self.layers = model.anatomy(exchange.receiver).stacks[""]
        missing = next((s for s in senders if s.kind == "mlp.out" and not self.layers[s.layer].has("mlp.out")), None)
        if missing is not None:
            raise UnsupportedError(f"sender '{missing}'", self.layers[missing.layer].refused["mlp.out"], "")
        moving = next((layer for layer in self.layers if layer.between), None)
        if moving is not None:
            found = f"{moving.between} adds to the stream between the layers, and is no part of any"
            raise UnsupportedError(f"paths through {model.name}", found, "patch sites instead")
        self.last = max(len(self.layers) if r.kind == FINAL else r.layer for r in receivers)
        kinds = {whole_of(s) for s in senders}
        self.gives = gives or observe(model, exchange.giver, kinds)
        self.given = self.gives.value(exchange.metric)
        self._known = {} if gets is None else gets.values
        self.how: str = "front"
        self.base: Base | None = None
        if rows or between != "frozen":
            self.how = "rows: asked for" if rows else f"rows: {between} in between"
        else:
            try:
                self.base = self._recorded()
                self._reducer = Reducer(self.base)
                for sender in senders:
                    self._delta((sender,), len(self.layers), True)
                self._tried(self.base)
            except (CannotReplayError, UnsupportedError) as error:
                self.how, self.base = f"rows: {error}", None

    @property
    def bytes(self) -> int:
        """Bytes of what it keeps of both runs."""
        return size_of(self.gives.values) + (0 if self.base is None else self.base.bytes)

    def reaches(self, sender: Sender, receiver: Site) -> bool:
        """Whether what a sender writes is there when a receiver reads."""
        if sender.kind == "embed" or receiver.kind == FINAL:
            return True
        after = receiver.kind == "mlp.in" and sender.kind == "attn.z" and not self.layers[receiver.layer].parallel
        return sender.layer < receiver.layer + after

    def changes(self, sets: Sequence[Some]) -> list[list[Intervention | None]]:
        """[set][receiver] what each set of senders, together, does to each receiver; None where none of it reaches."""
        if self.base is not None:
            by_receiver = [self._in_front(sets, receiver) for receiver in self.receivers]
        else:
            by_receiver = self._in_rows(sets)
        return [
            [
                found[n] if any(self.reaches(s, receiver) for s in some) else None
                for receiver, found in zip(self.receivers, by_receiver, strict=True)
            ]
            for n, some in enumerate(sets)
        ]

    # -- by what lies in front of the receivers -----------------------------------------------------------------------
    def _recorded(self) -> Base:
        """The base run, where whatever is written up to the last receiver is added to the residual stream."""
        reason = why_not(self.model, self.exchange.receiver)
        if reason:
            raise CannotReplayError(reason)
        added = [
            Site(kind, Items.of(i))
            for i in range(min(self.last, len(self.layers)))
            for kind in ("attn.out", "mlp.out")
            if self.layers[i].has(kind)
        ]
        senders = wanted(self.model, [_entering(s) for s in self.senders])
        base = record(self.model, self.exchange.receiver, dict.fromkeys([*senders, *added, *self._replayed()]))
        for i in range(min(self.last, len(self.layers))):
            call = base.layers[i]
            parts = [base.values[site][0] for site in added if site.layer == i]
            if not close(torch.stack([call.pre, *parts]).sum(0), call.post):
                raise CannotReplayError(f"layer {i} does more to the residual stream than add to it")
        return base

    def _tried(self, base: Base) -> None:
        """Two equal streams, side by side, must give each receiver the same; behind an indexer they do not."""
        for layer in {r.layer for r in self.receivers if r.kind in HEADS}:
            try:
                made = attention_inputs(base, layer, base.layers[layer].pre[None].repeat(2, 1, 1))
            except RuntimeError as error:
                raise CannotReplayError(f"layer {layer} takes whole prompts alone: {error}") from error
            if not all(close(x[0], x[1]) for x in made.values()):
                raise CannotReplayError(f"layer {layer} does not treat each row alone before it attends")

    def _replayed(self) -> list[Site]:
        """What replaying changes of the receivers needs of the base run; nothing where that is not possible."""
        kinds = {FINAL: "resid_post", "mlp.in": "mlp.out"}
        sites = [
            Site(kinds.get(r.kind, r.kind), Items.of(len(self.layers) - 1) if r.kind == FINAL else r.layers)
            for r in self.receivers
        ]
        try:
            return wanted(self.model, sites)
        except CannotReplayError:
            return []

    def _delta(self, some: Some, before: int, after_attention: bool) -> Tensor:
        """[pos, d_model] what senders change in the stream that enters layer ``before``.

        ``after_attention`` counts the heads of that layer in, where its MLP reads after them.
        """
        base = self.base
        if base is None:
            raise RuntimeError("there is no base run")
        total = torch.zeros_like(base.layers[0].pre, dtype=torch.float32)
        by_place: dict[Site, list[int]] = defaultdict(list)
        for sender in some:
            early = sender.kind == "embed" or sender.layer < before
            if early or (after_attention and sender.kind == "attn.z" and sender.layer == before):
                by_place[replace(sender, index=None)] += _heads(sender)
        for place, heads in by_place.items():
            site = _entering(place.at(index=sorted(heads)) if heads else place)
            key = str(site)
            if key not in self._deltas:
                item = self._patched(site)
                at = self.exchange.receiver.select(site.positions, f"sender '{site}'")[0]
                where, change = self._reducer.delta(entry(self.model, base.reach, at, 0, item))
                delta = torch.zeros_like(total)
                delta[where] = change.float()
                self._deltas[key] = delta
            total += self._deltas[key]
        return total

    @cached_property
    def _deltas(self) -> dict[str, Tensor]:
        return {}

    def _in_front(self, sets: Sequence[Some], receiver: Site) -> list[Intervention]:
        base = self.base
        if base is None:
            raise RuntimeError("there is no base run")
        mlp = receiver.kind == "mlp.in"
        layer = len(self.layers) if receiver.kind == FINAL else receiver.layer
        late = mlp and not self.layers[layer].parallel
        moved = torch.stack([self._delta(some, layer, late) for some in sets])
        if receiver.kind == FINAL:
            end = Site("resid_post", Items.of(len(self.layers) - 1))
            return [Add(end, delta[None]) for delta in moved]
        streams = (base.layers[layer].pre.float() + moved).to(base.layers[layer].pre.dtype)
        if mlp:
            return [self._received(receiver, x[None]) for x in mlp_outputs(base, layer, streams)]
        return [self._received(receiver, x[None]) for x in attention_inputs(base, layer, streams)[receiver.kind]]

    def _received(self, receiver: Site, whole: Tensor) -> Set:
        site = replace(receiver, kind="mlp.out") if receiver.kind == "mlp.in" else receiver
        return Set(site, part(whole, site, self.exchange.receiver))

    def _patched(self, site: Site) -> Set:
        """A sender's output set to what the giving run has."""
        return Set(site, part(self.gives.values[site.whole()], site, self.exchange.giver))

    # -- by whole layers, every set a row -----------------------------------------------------------------------------
    def _got(self, site: Site) -> Tensor:
        """What the receiving run has at a site: as it was recorded, or from a run of its own."""
        return self._known[site] if site in self._known else self._gets[site]

    @cached_property
    def _gets(self) -> Trace:
        """The receiving run, up to the last receiver."""
        kinds = ("attn.z", "attn.out", "mlp.out")
        layers = range(min(self.last + 1, len(self.layers)))
        sites = [Site(kind, Items.of(i)) for i in layers for kind in kinds if self.layers[i].has(kind)]
        for i in layers:
            for kind in ("attn.out", "mlp.out"):
                if not self.layers[i].has(kind) and self.between != "recomputed":
                    raise UnsupportedError(f"freeze layer {i}", self.layers[i].refused[kind], "between='recomputed'")
        if any(r.kind == FINAL for r in self.receivers):
            sites.append(Site("resid_post", Items.of(len(self.layers) - 1)))
        return self.model.trace(self.exchange.receiver, want=sites, stop=True)

    def _in_rows(self, sets: Sequence[Some]) -> list[list[Intervention]]:
        inputs = self.exchange.receiver
        size = 1 if inputs.extra else max(1, ROWS // inputs.ids.shape[1])
        found: list[list[Intervention]] = [[] for _ in self.receivers]
        for start in range(0, len(sets), size):
            some = sets[start : start + size]
            seen: dict[Site, Tensor] = {}
            rows = inputs if len(some) == 1 else inputs.repeat(len(some))
            end = Site("resid_post", Items.of(len(self.layers) - 1))
            final = any(r.kind == FINAL for r in self.receivers)
            want = {r.whole() for r in self.receivers if r.kind in HEADS} | ({end} if final else set())
            want |= {Site("resid_post", r.layers) for r in self.receivers if r.kind == "mlp.in"}
            trace = self.model.trace(rows, want=list(want), do=self._row_interventions(some, seen), stop=True)
            for received, receiver in zip(found, self.receivers, strict=True):
                for n in range(len(some)):
                    if receiver.kind == FINAL:
                        change = trace[end][n : n + 1] - self._got(end)
                        received.append(Add(end, change))
                    elif receiver.kind == "mlp.in":
                        received.append(self._received(receiver, seen[Site("mlp.out", receiver.layers)][n : n + 1]))
                    else:
                        received.append(self._received(receiver, trace[receiver.whole()][n : n + 1]))
        return found

    def _row_interventions(self, sets: Sequence[Some], seen: dict[Site, Tensor]) -> list[Intervention]:
        """Every row with its senders patched, and with what lies between as it is to be; fills ``seen`` as it runs."""
        by_layer: dict[tuple[int, str], list[tuple[int, Sender]]] = defaultdict(list)
        for row, some in enumerate(sets):
            for sender in some:
                by_layer[-1 if sender.kind == "embed" else sender.layer, sender.kind].append((row, sender))
        first = min(layer for layer, _ in by_layer)
        do: list[Intervention] = []
        if embedded := by_layer[-1, "embed"]:
            do.append(self._mixed(Site("resid_pre", Items.of(0)), embedded, None, False, seen))
        for i in range(min(self.last + 1, len(self.layers))):
            heads, mlps = by_layer[i, "attn.z"], by_layer[i, "mlp.out"]
            attention, mlp = self.between != "recomputed", self.between == "frozen"
            site = Site("attn.z", Items.of(i))
            if heads:
                moved = attention and first < i  # below the first sender nothing moves the other heads
                do.append(self._mixed(site, heads, self._got(site) if moved else None, False, seen))
            receives = any(r.kind == "mlp.in" and r.layer == i for r in self.receivers)
            read = i < self.last or receives
            if attention and read:
                out = Site("attn.out", Items.of(i))
                live = [row for row, _ in heads]
                do.append(self._mixed(out, [], self._got(out), False, seen, live))
            out = Site("mlp.out", Items.of(i))
            if mlps or (mlp and read) or receives:
                do.append(self._mixed(out, mlps, self._got(out) if mlp else None, receives, seen))
        return do

    def _mixed(
        self,
        place: Site,
        senders: Sequence[tuple[int, Sender]],
        frozen: Tensor | None,
        keep: bool,
        seen: dict[Site, Tensor],
        live: Sequence[int] = (),
    ) -> Apply:
        """At ``place``: ``frozen`` in all rows but the ``live`` ones, then each row's senders as the giver has them.

        ``keep`` what was there before in ``seen``.
        """

        def change(x: Tensor, where: Where) -> Tensor:
            if keep:
                seen[place] = x.clone()
            new = x.clone() if frozen is None else frozen.expand_as(x).clone()
            if live:
                new[list(live)] = x[list(live)]
            for row, sender in senders:
                whole = _entering(sender)
                at = torch.tensor(self.exchange.receiver.select(whole.positions, f"sender '{sender}'")[0])
                gives = self.gives.values[whole.whole()][0, at].to(x)
                if heads := _heads(sender):
                    new[row, at[:, None], torch.tensor(heads)] = gives[:, heads]
                else:
                    new[row, at] = gives
            return new

        return Apply(place, change)


def whole_of(sender: Sender) -> Site:
    """The whole tensor that a sender's output is part of."""
    return _entering(sender).whole()


def _entering(sender: Sender) -> Site:
    """The embedding as what enters the first layer: with positions and image features."""
    return Site("resid_pre", Items.of(0), positions=sender.positions) if sender.kind == "embed" else sender


def _heads(sender: Sender) -> list[int]:
    return [] if sender.index is None else [i for a, b in sender.index for i in range(a, b + 1)]
