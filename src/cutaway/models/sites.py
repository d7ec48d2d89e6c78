"""The sites of a model: what there is, of which shape, under which names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cutaway.core.errors import SiteSyntaxError
from cutaway.core.names import transformer_lens
from cutaway.core.site import KINDS, Site
from cutaway.models.plan import Anatomy, Layer

if TYPE_CHECKING:
    from cutaway.models.handle import Model
    from cutaway.results.table import Table

ATTENTION_SIZES = {"head": "heads", "kv_head": "kv_heads", "d_head": "d_head", "d_value": "d_value"}


@dataclass(frozen=True)
class SiteInfo:
    """One site of a model: its text, its axes with their sizes, its equation, its two foreign names."""

    site: str
    axes: str
    equation: str
    transformer_lens: str
    module: str


def sizes(layer: Layer) -> dict[str, int]:
    """Size of each named axis that the layer's structure fixes."""
    found = {"d_model": layer.d_model, "expert": layer.n_experts}
    if layer.attention is not None:
        found |= {axis: getattr(layer.attention, name) for axis, name in ATTENTION_SIZES.items()}
    return found


def _axes(kind: str, known: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={known[axis]}" if known.get(axis) else axis for axis in KINDS[kind].axes)


def _equation(kind: str, layer: Layer) -> str:
    attn = f"norm({layer.norms['attn'].rsplit('.', 1)[-1]})" if "attn" in layer.norms else ""
    mlp = f"norm({layer.norms['mlp'].rsplit('.', 1)[-1]})" if "mlp" in layer.norms else ""
    if kind == "resid_mid":
        return f"{attn} of resid_pre + attn.out" if attn else "resid_pre + attn.out"
    if kind == "resid_post":
        before = "resid_pre + attn.out" if layer.parallel or not layer.has("resid_mid") else "resid_mid"
        whole = f"{before} + mlp.out" if layer.has("mlp.out") else "what leaves the layer"
        return f"{mlp} of {whole}" if mlp else whole
    return KINDS[kind].equation


def _module(kind: str, layer: Layer) -> str:
    if kind in layer.read:
        tap = layer.read[kind]
        return f"{tap.where} {tap.module}"
    if kind.startswith("expert."):
        return f"inside {layer.experts}"
    return f"inside {layer.attention.module}" if layer.attention is not None else ""


def sites(anatomy: Anatomy) -> Iterator[SiteInfo]:
    """Every site that a model has, in the order of the forward pass."""
    kinds = list(KINDS)
    for kind in ("embed", "projector"):
        if kind in anatomy.taps:
            yield _unlayered(kind, anatomy)
    for scope, layers in sorted(anatomy.stacks.items(), reverse=True):
        prefix = f"{scope}/" if scope else ""
        for i, layer in enumerate(layers):
            for kind in kinds:
                if KINDS[kind].layered and layer.has(kind):
                    known = sizes(layer) | {"neuron": layer.d_expert if kind.startswith("expert.") else layer.d_mlp}
                    name = "" if scope else transformer_lens(kind, i, layer.changes(kind))
                    yield SiteInfo(
                        f"{prefix}L{i}.{kind}", _axes(kind, known), _equation(kind, layer), name, _module(kind, layer)
                    )
    if "final_norm" in anatomy.taps:
        yield _unlayered("final_norm", anatomy)


def _unlayered(kind: str, anatomy: Anatomy) -> SiteInfo:
    tap = anatomy.taps[kind]
    axes = _axes(kind, {"d_model": anatomy.d_model})
    return SiteInfo(kind, axes, KINDS[kind].equation, transformer_lens(kind), f"{tap.where} {tap.module}")


def refusals(anatomy: Anatomy, image: bool | None = None) -> dict[str, str]:
    """Reason per refused site, leaving out what the structure cannot have.

    Left out: experts where there are none, resid_mid in parallel blocks, mlp.act in mixtures of experts (expert.act is
    there), dictionaries, and the vision side of models that take no image (``image``; by default, that show none).
    """
    image = "vision" in anatomy.stacks if image is None else image
    found: dict[str, str] = {k: v for k, v in anatomy.refused.items() if k != "sae" and (image or k != "projector")}
    for scope, layers in anatomy.stacks.items():
        for layer in layers:
            absent = {"sae"} | ({"resid_mid"} if layer.parallel else set())
            absent |= {"mlp.in", "mlp.act"} if layer.experts else {"expert.gate", "expert.act"}
            for kind, why in layer.refused.items():
                if kind not in absent:
                    found.setdefault(f"{scope}/{kind}" if scope else kind, why)
    if image and "vision" not in anatomy.stacks:
        found["vision/"] = "no layers of a vision tower were found"
    return found


def site_table(model: Model) -> Table:
    """One row per site of a model: shape with named axes, equation, TransformerLens' name, module path."""
    from cutaway.results.table import Table

    anatomy = model.anatomy(model.encoder.image_sample())
    rows = list(sites(anatomy))
    refused = sorted(f"{site}: {why}" for site, why in refusals(anatomy).items())
    return Table(
        title=f"sites of {model.name} ({type(model.hf).__name__})",
        columns={
            "site": [r.site for r in rows],
            "axes": [r.axes for r in rows],
            "equation": [r.equation for r in rows],
            "TransformerLens": [r.transformer_lens for r in rows],
            "module": [r.module for r in rows],
        },
        notes=tuple(f"refused: {line}" for line in refused),
    )


def site_of_module(path: str, anatomy: Anatomy) -> Site:
    """The site that a module's output is (or its input, where only that is a site).

    Raises:
        SiteSyntaxError: no site is read at that module.
    """
    found: dict[str, str] = {}
    for kind, tap in anatomy.taps.items():
        if tap.op is None and tap.module == path:
            found.setdefault(tap.where, kind)
    for scope, layers in anatomy.stacks.items():
        for i, layer in enumerate(layers):
            for kind, tap in layer.read.items():
                if tap.op is None and tap.module == path:
                    found.setdefault(tap.where, f"{scope + '/' if scope else ''}L{i}.{kind}")
    if not found:
        raise SiteSyntaxError(f"site {path!r}", "no site is read at that module", "'cutaway sites MODEL' lists them")
    return Site.parse(found.get("out") or found["in"])
