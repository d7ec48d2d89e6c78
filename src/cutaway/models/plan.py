"""What is known of a model's structure: for each site, the tap where it is read and written, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from cutaway.core.errors import SiteMissingError, nearest
from cutaway.core.site import KINDS, Site
from cutaway.models.recorder import OpKey

AttentionStyle = Literal["interface", "sdpa", "inline"]


@dataclass(frozen=True)
class Tap:
    """One place where a tensor passes by.

    Attributes:
        where: "in" / "out" of a module, or "op": the result of a torch call in a module's own forward.
        module: path of the module (of the call's owner).
        slot: index or keyword of the argument, index in a returned tuple, None for a lone tensor.
        op: which call, for "op".
        clone: later calls write over this tensor, so a reader must copy it.
    """

    where: Literal["in", "out", "op"]
    module: str
    slot: int | str | None = None
    op: OpKey | None = None
    clone: bool = False


@dataclass(frozen=True)
class Attention:
    """How a layer attends: the module, the style of its call, and the sizes of its heads.

    Attributes:
        changed: "q" and "k" where they are not their matrix's output as it came, but rotated, normed or scaled.
    """

    module: str
    style: AttentionStyle
    heads: int
    kv_heads: int
    d_head: int
    d_value: int
    calls: int = 1
    z_heads_first: bool = False
    flat: bool = False
    keys: Mapping[str, OpKey] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Step:
    """One step from the last residual stream to the logits: a module, or a torch call with constants."""

    module: str = ""
    call: tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any]] | None = None
    slot: int = 0

    def run(self, root: nn.Module, x: Tensor) -> Tensor:
        """The step applied to ``x``."""
        if self.call is None:
            out: Tensor = root.get_submodule(self.module)(x)
            return out
        func, args, kwargs = self.call
        result = func(*[x if i == self.slot else a for i, a in enumerate(args)], **kwargs)
        if not isinstance(result, Tensor):
            raise TypeError(f"{getattr(func, '__name__', func)} gives no tensor")
        return result


@dataclass(frozen=True)
class Intake:
    """A matrix through which a layer takes the residual stream in.

    Attributes:
        module: its path. rows: which of its outputs, in order, where a fused matrix makes more; None for all.
        norm: module path of the norm in front of it; "" for none.
    """

    module: str
    rows: tuple[int, ...] | None
    norm: str


@dataclass(frozen=True)
class Layer:
    """One layer: its taps, the matrices that read and write the stream, what is refused and why.

    Attributes:
        path: module path of the layer.
        read, write: tap per site kind; kinds of attention's insides and of experts are not in them.
        attention: how it attends; None when it has no attention.
        experts: path of the experts module; "" when it has none.
        w_out, w_o: paths of the linear modules that write mlp.act and attn.z into the residual stream.
        gated: heads are multiplied by something else that the layer computes before w_o reads them.
        norms: module path of the norm applied to the sum (post-norm layers), per "attn" / "mlp".
        behind: module path of the norm that what the part adds comes out of, perhaps multiplied, per "attn" / "mlp".
        terms: how many terms it adds to the stream; more than it has of attn.out and mlp.out where some are not told.
        parallel: attention and MLP read the same state, so there is no resid_mid.
        d_model, d_mlp, n_experts, d_expert: sizes; 0 where there is none.
        refused: reason per site kind.
        intakes: the matrices that make its values ("v", by kv head and channel) and pre-activations ("up", "gate"), or
            the module that holds those of its "experts".
        activation: steps from the gate's pre-activation, or that of an MLP without gate, to its activation.
        no_intake: reason per "v" / "mlp".
        inserted: the model adds something between the layer before and this one, such as image features.
        between: path of a module that makes that from the stream; "" where it is nothing of the kind.
    """

    path: str
    read: Mapping[str, Tap]
    write: Mapping[str, Tap]
    attention: Attention | None
    experts: str
    w_out: str
    w_o: str
    norms: Mapping[str, str]
    parallel: bool
    d_model: int
    d_mlp: int
    n_experts: int
    d_expert: int
    refused: Mapping[str, str]
    intakes: Mapping[str, Intake] = field(default_factory=dict)
    activation: tuple[Step, ...] = ()
    behind: Mapping[str, str] = field(default_factory=dict)
    gated: bool = False
    no_intake: Mapping[str, str] = field(default_factory=dict)
    inserted: bool = False
    between: str = ""
    terms: int = 0

    def changes(self, kind: str) -> bool:
        """Whether ``attn.q`` or ``attn.k`` is here something else than its matrix's output."""
        return self.attention is not None and kind in {f"attn.{side}" for side in self.attention.changed}

    def with_stream(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the layer is called with, ``x`` in place of the residual stream."""
        slot = self.read["resid_pre"].slot
        if isinstance(slot, str):
            return tuple(args), {**kwargs, slot: x}
        at = slot or 0
        return (*args[:at], x, *args[at + 1 :]), dict(kwargs)

    def has(self, kind: str) -> bool:
        """Whether a layered site kind is here."""
        return kind not in self.refused


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear module keeps its weight as [in, out] (GPT-2's Conv1D) and not [out, in]."""
    return type(module).__name__ == "Conv1D"


@dataclass(frozen=True)
class Anatomy:
    """The structure of a model, as one watched forward pass showed it.

    Attributes:
        stacks: layers by scope: "" the language model, "vision" the vision tower.
        taps: tap per kind that is in no layer (embed, final_norm, projector).
        tail: steps from the last resid_post to the logits; empty when they could not be told.
        refused: reason per kind that is in no layer; "readout" for the tail.
        d_model: width of the language model's residual stream.
        unread: scopes that the model has and that did not run, for want of an image.
    """

    stacks: Mapping[str, tuple[Layer, ...]]
    taps: Mapping[str, Tap]
    tail: tuple[Step, ...]
    refused: Mapping[str, str]
    d_model: int
    unread: frozenset[str] = frozenset()

    def layers(self, scope: str, site: str = "") -> tuple[Layer, ...]:
        """The layers of a scope; SiteMissingError naming the scopes there are."""
        if scope not in self.stacks:
            have = ", ".join(f"'{s}/'" if s else "no prefix (the language model)" for s in self.stacks)
            asked = f"site '{site}'"
            if scope == "vision" and "vision" in self.unread:
                found = "the vision tower was not read yet, which takes inputs with an image"
                raise SiteMissingError(asked, found, "trace an image first, or call model.anatomy(inputs)")
            raise SiteMissingError(asked, f"the model has no layers in scope {scope!r}", f"scopes: {have}")
        return self.stacks[scope]

    def expand(self, site: Site, name: str) -> list[Site]:
        """The concrete sites that ``site`` names, one per layer.

        ``L*`` skips layers that lack the kind as long as one layer has it. Raises SiteMissingError with the reason and
        SiteRangeError for layers, heads or neurons that are not there.
        """
        kind = KINDS[site.kind]
        if not kind.layered:
            if site.kind not in self.taps:
                why = self.refused.get(site.kind, "it was not seen in the forward pass")
                have = [k for k in self.taps if k != site.kind]
                raise SiteMissingError(f"site '{site}' of {name}", why, nearest(str(site), have))
            return [site]
        layers = self.layers(site.scope, str(site))
        concrete = site.expand(len(layers))
        here = [s for s in concrete if layers[s.layer].has(s.kind)]
        if not here or (site.layers is not None and len(here) < len(concrete)):
            missing = next(s for s in concrete if not layers[s.layer].has(s.kind))
            have = sorted(k for k in KINDS if KINDS[k].layered and layers[missing.layer].has(k))
            why = layers[missing.layer].refused[missing.kind]
            raise SiteMissingError(
                f"site '{missing.whole()}' of {name}", why, f"layer {missing.layer} has {', '.join(have)}"
            )
        for s in here:
            attention = layers[s.layer].attention
            if (
                s.positions is not None
                and s.kind.startswith("attn.")
                and attention
                and attention.calls > 1
                and s.kind != "attn.out"
            ):
                found = f"layer {s.layer} attends in {attention.calls} separate chunks"
                raise SiteMissingError(f"site '{s}' of {name}", found, f"name all positions: '{s.at().whole()}'")
            if s.index is not None and kind.index_axis:
                s.index.resolve(self.size(s), kind.index_axis, f"site '{s}'")
            if s.inner is not None:
                s.inner.resolve(layers[s.layer].d_expert, "neuron", f"site '{s}'")
        return here

    def size(self, site: Site) -> int:
        """How many heads, neurons or experts a concrete site has on its index axis."""
        layer = self.layers(site.scope, str(site))[site.layer]
        attention = layer.attention
        sizes = {"mlp.act": layer.d_mlp, "expert.gate": layer.n_experts, "expert.act": layer.n_experts}
        if attention is not None:
            by_query = dict.fromkeys(("attn.q", "attn.scores", "attn.pattern", "attn.z"), attention.heads)
            sizes |= by_query | dict.fromkeys(("attn.k", "attn.v"), attention.kv_heads)
        return sizes[site.kind]
