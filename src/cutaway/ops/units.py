"""Components by name: whole sublayers, heads, source positions of heads, and neurons, with their text and back.

    L3.attn.out   L3.mlp.out          what a layer's attention or MLP adds
    L3.attn.z[5]                      a head                  L3.attn.z[5] from 2      what it brings from position 2
    L3.attn.z[5/17]                   an attention neuron     L3.attn.z[5/17] from 2   (head / channel)
    L3.mlp.act[7]                     an FFN neuron           L3.expert.act[2/7]       one of an expert

What has no ``from`` and no ``head/channel`` is the text of a site.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from cutaway.core.errors import SiteSyntaxError
from cutaway.core.site import Site

Family = tuple[str, bool, bool]
"""What components are matched by beside their layer: kind, whether inside a head, whether by source position."""
EMBED = "embed"  # what rankings call the embedding, which is none of these
WHOLE = ("attn.out", "mlp.out")
INDEXED = ("attn.z", "mlp.act", "expert.act")
_TEXT = re.compile(
    r"L(?P<layer>\d+)\.(?P<kind>[a-z]+\.[a-z]+)(?:\[(?P<index>\d+)(?:/(?P<inner>\d+))?\])?(?: from (?P<source>\d+))?"
)


class Unit(NamedTuple):
    """One component: -1 stands for "not one of several".

    Attributes:
        kind: of the site. layer: its number.
        number: of the head, neuron or expert. inner: channel of a head, neuron of an expert.
        source: the position that a head brings it from.
        at: the one position that it is at; such a component is not read from text.
    """

    kind: str
    layer: int
    number: int = -1
    inner: int = -1
    source: int = -1
    at: int = -1

    @staticmethod
    def parse(text: str) -> Unit:
        """The component of a text; SiteSyntaxError when it names none, or several."""
        match = _TEXT.fullmatch(text.strip())
        if not match or match["kind"] not in (*WHOLE, *INDEXED):
            raise SiteSyntaxError(f"component {text!r}", "it does not read as one", "write 'L3.mlp.act[7]'")
        found = Unit(match["kind"], *(int(match[g] or -1) if match[g] else -1 for g in ("layer", "index", "inner")))
        found = found._replace(source=int(match["source"]) if match["source"] else -1)
        if (found.number < 0) != (found.kind in WHOLE):
            raise SiteSyntaxError(f"component {text!r}", "it names a whole layer", "name one neuron or head of it")
        if (found.kind == "expert.act") != (found.inner >= 0) and found.kind != "attn.z":
            raise SiteSyntaxError(f"component {text!r}", "expert neurons, and only they, are 'expert/neuron'", "")
        if found.source >= 0 and found.kind != "attn.z":
            raise SiteSyntaxError(f"component {text!r}", "only heads bring something from a position", "")
        return found

    @staticmethod
    def of_site(site: Site, anatomy: Any) -> list[Unit]:
        """The components that a concrete site names; SiteSyntaxError for kinds that are none, and for positions."""
        layer = anatomy.layers(site.scope)[site.layer]
        if site.kind not in (*WHOLE, *INDEXED) or site.scope or site.positions is not None:
            found = "components are heads, neurons and sublayers of the language model, at all positions"
            raise SiteSyntaxError(f"site '{site}'", found, f"use {', '.join((*WHOLE, *INDEXED))}, without '@'")
        if site.kind in WHOLE:
            return [Unit(site.kind, site.layer)]
        n = anatomy.size(site)
        numbers = range(n) if site.index is None else site.index.resolve(n, "component", f"site '{site}'")
        if site.kind != "expert.act":
            return [Unit(site.kind, site.layer, i) for i in numbers]
        m = layer.d_expert
        inside = range(m) if site.inner is None else site.inner.resolve(m, "neuron", f"site '{site}'")
        return [Unit(site.kind, site.layer, i, j) for i in numbers for j in inside]

    @property
    def whole(self) -> str:
        """The site of its head, neuron or sublayer, without channel and source."""
        return str(self._replace(source=-1, inner=-1 if self.kind == "attn.z" else self.inner))

    @property
    def family(self) -> Family:
        """What it is matched by in random draws, beside its layer."""
        return self.kind, self.kind == "attn.z" and self.inner >= 0, self.source >= 0

    def __str__(self) -> str:
        inner = f"/{self.inner}" if self.inner >= 0 else ""
        index = f"[{self.number}{inner}]" if self.number >= 0 else ""
        place = (f"@{self.at}" if self.at >= 0 else "") + (f" from {self.source}" if self.source >= 0 else "")
        return f"L{self.layer}.{self.kind}{index}{place}"
