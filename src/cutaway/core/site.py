"""Sites: the names of the places in a model.

Grammar (``parse`` and ``str`` are inverse)::

    site      = [scope "/"] ["L" layers "."] kind ["[" index "]"] ["@" positions]
    layers    = "*" | items            L*   L3   L-1   L0-5   L0+2+4-6
    index     = items                  heads, neurons, features or experts; expert neurons are  expert/neuron
    positions = items | role           @-1   @0-3+7   @image
    items     = item {"+" item};  item = int | int "-" int   (both ends included)

Positions count the real tokens of each row, so padding never moves them; negative ones count from the end.
A list of sites is separated by commas: ``"L*.resid_post, L3.attn.pattern[0-3]"``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from cutaway.core.errors import SiteRangeError, SiteSyntaxError, nearest
from cutaway.core.names import from_transformer_lens


class Kind(NamedTuple):
    """What one kind of site is: its axes in order, the axis an index selects, its equation."""

    axes: tuple[str, ...]
    index_axis: str | None
    layered: bool
    equation: str


RESID = ("batch", "pos", "d_model")
KINDS: dict[str, Kind] = {
    "embed": Kind(RESID, None, False, "token embedding of each position"),
    "resid_pre": Kind(RESID, None, True, "residual stream entering the layer"),
    "attn.q": Kind(("batch", "pos", "head", "d_head"), "head", True, "query as attention uses it (after rotary)"),
    "attn.k": Kind(("batch", "key_pos", "kv_head", "d_head"), "kv_head", True, "key as attention uses it"),
    "attn.v": Kind(("batch", "key_pos", "kv_head", "d_value"), "kv_head", True, "value"),
    "attn.scores": Kind(
        ("batch", "head", "query_pos", "key_pos"), "head", True, "softmax's input: q k^T scaled, masked"
    ),
    "attn.pattern": Kind(("batch", "head", "query_pos", "key_pos"), "head", True, "softmax(scores)"),
    "attn.z": Kind(("batch", "pos", "head", "d_value"), "head", True, "pattern @ v"),
    "attn.out": Kind(RESID, None, True, "what attention (or a mixer in its place) adds to the residual stream"),
    "resid_mid": Kind(RESID, None, True, "resid_pre + attn.out"),
    "mlp.in": Kind(RESID, None, True, "input of the MLP (after its norm)"),
    "mlp.act": Kind(("batch", "pos", "neuron"), "neuron", True, "input of the MLP's output matrix"),
    "mlp.out": Kind(RESID, None, True, "what the MLP adds to the residual stream"),
    "expert.gate": Kind(("batch", "pos", "expert"), "expert", True, "routing weight of each expert, 0 if not routed"),
    "expert.act": Kind(("batch", "pos", "expert", "neuron"), "expert", True, "input of each expert's output matrix"),
    "resid_post": Kind(RESID, None, True, "residual stream leaving the layer"),
    "final_norm": Kind(RESID, None, False, "final norm's output: what is unembedded"),
    "projector": Kind(("image_token", "d_model"), None, False, "image features as they enter the language model"),
    "sae": Kind(("batch", "pos", "feature"), "feature", True, "activations of a dictionary attached to the model"),
}
ROLES = ("text", "image", "special", "all")
MEANT = {"logits": "they are no site; what they are read from is 'final_norm'"}
"""What is written for a site and is none."""


class Items(tuple[tuple[int, int], ...]):
    """A union of inclusive integer ranges; negative ends count from the end."""

    @classmethod
    def parse(cls, text: str, whole: str) -> Items:
        found = []
        for part in text.split("+"):
            match = re.fullmatch(r"\s*(-?\d+)(?:-(-?\d+))?\s*", part)
            if not match:
                raise SiteSyntaxError(
                    f"site {whole!r}", f"{part!r} is not a number or a range", "write 3, 0-5 or 0+2+4"
                )
            low = int(match[1])
            found.append((low, low if match[2] is None else int(match[2])))
        return cls(found)

    @classmethod
    def of(cls, values: int | slice | Iterable[int] | Items) -> Items:
        """Ranges covering ``values`` in the given order, neighbours joined; Items as they are."""
        if isinstance(values, Items):
            return values
        if isinstance(values, int):
            return cls([(values, values)])
        if isinstance(values, slice):
            raise SiteSyntaxError("items", f"{values} has no text form", "name the first and the last item: '0-5'")
        runs: list[tuple[int, int]] = []
        for value in values:
            if runs and value == runs[-1][1] + 1 and (value >= 0) == (runs[-1][0] >= 0):
                runs[-1] = (runs[-1][0], value)
            else:
                runs.append((value, value))
        return cls(runs)

    def resolve(self, size: int, what: str, whole: str) -> list[int]:
        """The integers named, in order, for an axis of ``size``; SiteRangeError outside it."""
        values: list[int] = []
        for low, high in self:
            first, last = (v + size if v < 0 else v for v in (low, high))
            if not (0 <= first < size and 0 <= last < size) or last < first:
                named = f"{low}" if low == high else f"{low}-{high}"
                raise SiteRangeError(f"{whole}", f"{what} {named} is not there: the valid {what}s are 0-{size - 1}")
            values.extend(range(first, last + 1))
        return values

    def __str__(self) -> str:
        return "+".join(f"{a}" if a == b else f"{a}-{b}" for a, b in self)


_SITE = re.compile(
    r"(?:(?P<scope>[a-z_]+)/)?(?:L(?P<layers>\*|[-+\d]+)\.)?(?P<kind>[a-z_]+(?:\.[a-z_]+)?)"
    r"(?:\[(?P<index>[-+\d]+)(?:/(?P<inner>[-+\d]+))?\])?(?:@(?P<positions>[-+\d]+|[a-z]+))?"
)


@dataclass(frozen=True, slots=True)
class Site:
    """A place in a model: kind, layers, heads or neurons, positions.

    Attributes:
        kind: a key of ``KINDS``.
        layers: None means every layer (``L*``) for layered kinds.
        index: heads, neurons, features or experts; None means all of them.
        inner: neurons inside the experts of ``index`` (expert kinds only).
        positions: token positions, a role name, or None for all.
        scope: "" for the language model, "vision" for the vision tower.
    """

    kind: str
    layers: Items | None = None
    index: Items | None = None
    inner: Items | None = None
    positions: Items | str | None = None
    scope: str = ""

    @staticmethod
    @lru_cache(maxsize=65536)
    def parse(text: str) -> Site:
        """The site that ``text`` names; SiteSyntaxError with the nearest kind when it names none."""
        match = _SITE.fullmatch(from_transformer_lens(text.strip()) or text.strip())
        if not match:
            raise SiteSyntaxError(f"site {text!r}", "it does not read as a site", "write for example 'L3.attn.z[5]@-1'")
        kind, layers = match["kind"], match["layers"]
        if kind not in KINDS:
            hint = MEANT.get(kind) or nearest(kind, KINDS) or f"kinds: {', '.join(KINDS)}"
            raise SiteSyntaxError(f"site {text!r}", f"there is no kind {kind!r}", hint)
        if KINDS[kind].layered and layers is None:
            raise SiteSyntaxError(
                f"site {text!r}", f"{kind} is in every layer", f"name the layer: 'L3.{kind}' or 'L*.{kind}'"
            )
        if not KINDS[kind].layered and layers is not None:
            raise SiteSyntaxError(f"site {text!r}", f"{kind} is in no layer", f"write {kind!r}")
        if match["index"] and KINDS[kind].index_axis is None:
            raise SiteSyntaxError(
                f"site {text!r}", f"{kind} has no heads or neurons to choose", "leave the brackets out"
            )
        if match["inner"] and not kind.startswith("expert."):
            raise SiteSyntaxError(f"site {text!r}", "only experts have neurons inside", "write 'L1.expert.act[2/7]'")
        positions = match["positions"]
        if positions is not None and positions[0].isalpha() and positions not in ROLES:
            raise SiteSyntaxError(f"site {text!r}", f"there is no role {positions!r}", f"roles: {', '.join(ROLES)}")
        return Site(
            kind=kind,
            layers=None if layers in (None, "*") else Items.parse(layers, text),
            index=Items.parse(match["index"], text) if match["index"] else None,
            inner=Items.parse(match["inner"], text) if match["inner"] else None,
            positions=None
            if positions is None
            else positions
            if positions[0].isalpha()
            else Items.parse(positions, text),
            scope=match["scope"] or "",
        )

    def __str__(self) -> str:
        scope = f"{self.scope}/" if self.scope else ""
        layer = f"L{'*' if self.layers is None else self.layers}." if KINDS[self.kind].layered else ""
        inner = f"/{self.inner}" if self.inner is not None else ""
        index = f"[{self.index}{inner}]" if self.index is not None else ""
        positions = f"@{self.positions}" if self.positions is not None else ""
        return f"{scope}{layer}{self.kind}{index}{positions}"

    @property
    def layer(self) -> int:
        """The one layer of this site; SiteSyntaxError when it names several or none."""
        if self.layers is None or len(self.layers) != 1 or self.layers[0][0] != self.layers[0][1]:
            raise SiteSyntaxError(
                f"site '{self}'", "it does not name exactly one layer", "expand it over the layers first"
            )
        return self.layers[0][0]

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of this site's tensor, in order."""
        return KINDS[self.kind].axes

    def at(
        self,
        *,
        layer: int | None = None,
        index: int | Sequence[int] | Items | None = None,
        inner: Sequence[int] | Items | None = None,
        positions: int | str | Sequence[int] | Items | None = None,
    ) -> Site:
        """This site at a layer, heads or neurons, neurons inside experts, or positions; what is not given stays."""
        site = self
        if layer is not None:
            site = replace(site, layers=Items.of(layer))
        if index is not None:
            site = replace(site, index=Items.of(index))
        if inner is not None:
            site = replace(site, inner=Items.of(inner))
        if positions is not None:
            site = replace(site, positions=positions if isinstance(positions, str) else Items.of(positions))
        return site

    def whole(self) -> Site:
        """This site without its index and positions: the full tensor."""
        return replace(self, index=None, inner=None, positions=None)

    def expand(self, n_layers: int) -> list[Site]:
        """One site per layer, negative layers made positive; SiteRangeError outside ``0..n_layers-1``."""
        if not KINDS[self.kind].layered:
            return [self]
        layers = range(n_layers) if self.layers is None else self.layers.resolve(n_layers, "layer", f"site '{self}'")
        return [replace(self, layers=Items.of(layer)) for layer in layers]


SiteLike = str | Site


def parse_sites(want: SiteLike | Iterable[SiteLike]) -> list[Site]:
    """Sites of a comma-separated text, a site, or any mix of them in a list."""
    if isinstance(want, Site):
        return [want]
    if isinstance(want, str):
        return [Site.parse(part) for part in want.split(",") if part.strip()]
    return [site for item in want for site in parse_sites(item)]
