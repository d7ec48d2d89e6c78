"""Names that TransformerLens gives to the same places."""

from __future__ import annotations

import re

TRANSFORMER_LENS: dict[str, str] = {
    "embed": "hook_embed",
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "attn.q": "blocks.{layer}.attn.hook_q",
    "attn.k": "blocks.{layer}.attn.hook_k",
    "attn.v": "blocks.{layer}.attn.hook_v",
    "attn.scores": "blocks.{layer}.attn.hook_attn_scores",
    "attn.pattern": "blocks.{layer}.attn.hook_pattern",
    "attn.z": "blocks.{layer}.attn.hook_z",
    "attn.out": "blocks.{layer}.hook_attn_out",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "mlp.in": "blocks.{layer}.mlp.hook_in",
    "mlp.act": "blocks.{layer}.mlp.hook_post",
    "mlp.out": "blocks.{layer}.hook_mlp_out",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "final_norm": "ln_final.hook_out",
}
"""Template per site kind, of the bridge of TransformerLens 4. Where the same name means another tensor in one
architecture: docs/concepts/names.md."""

AFTER_ROTARY: dict[str, str] = {
    "attn.q": "blocks.{layer}.attn.hook_rot_q",
    "attn.k": "blocks.{layer}.attn.hook_rot_k",
}
"""What ``attn.q`` and ``attn.k`` are called in models that rotate them: ``hook_q`` is there before the rotation."""


def transformer_lens(kind: str, layer: int | None = None, changed: bool = False) -> str:
    """TransformerLens' name of a site kind at a layer (``{layer}`` left open for None); '' when it has none.

    ``changed``: the layer rotates (norms, scales) its queries or keys, so that ``attn.q`` is not its ``hook_q``.
    """
    template = (AFTER_ROTARY if changed else TRANSFORMER_LENS).get(kind, "")
    return template if layer is None else template.format(layer=layer)


def from_transformer_lens(text: str) -> str:
    """Our text of a TransformerLens name, e.g. ``L3.attn.z``; '' when it is none."""
    for kind, template in [*TRANSFORMER_LENS.items(), *AFTER_ROTARY.items()]:
        match = re.fullmatch(re.escape(template).replace(r"\{layer\}", r"(\d+)"), text)
        if match:
            return f"L{match[1]}.{kind}" if match.groups() else kind
    return ""
