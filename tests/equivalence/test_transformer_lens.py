"""Sites equal what TransformerLens' bridge saw at the same names, and differ from it only where and as we say.

tools/make_oracle.py made the arrays where transformer-lens is installed; see tests/golden/transformer_lens/README.md.
docs/concepts/names.md tells the differences; each has its test here.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cutaway.core.errors import SiteMissingError, SiteSyntaxError
from cutaway.core.intervention import Zero
from cutaway.core.names import AFTER_ROTARY, TRANSFORMER_LENS, from_transformer_lens, transformer_lens
from cutaway.core.site import Site
from cutaway.core.trace import Trace
from cutaway.models.handle import Model
from tools.make_oracle import FOLDER, KEPT, build, recipes

TOLERANCE = 1e-5
NAMES = sorted(recipes())
MIXTURES = {"mixtral", "gpt_oss", "deepseek_v3"}
LATENT = {"deepseek_v3"}  # keys and values come out of one narrow projection
ROTARY = {"gpt_neox", "gptj", "falcon", "llama", "qwen3", "gemma2", "olmo2", "granite", "mixtral", "gpt_oss"}
NORM_ON_QUERIES = {"qwen3", "olmo2"}

# Hook -> the models in which the bridge keeps another tensor under that name than the site's. Nothing else may differ.
DIFFERENT = {
    "attn.hook_q": ROTARY | LATENT | {"opt"},
    "attn.hook_k": ROTARY | LATENT,
    "attn.hook_v": LATENT,
    "attn.hook_z": LATENT,
    "attn.hook_rot_q": LATENT,
    "attn.hook_rot_k": LATENT,
    "attn.hook_attn_scores": {"gptj", "opt", "gpt_neo", "gpt_oss"},
    "hook_embed": {"bloom", "granite"},
    "mlp.hook_in": MIXTURES,
    "mlp.hook_post": MIXTURES,
    "ln_final.hook_normalized": set(NAMES),
}


class Seen(NamedTuple):
    """One model, what the bridge kept of it, and our trace of every site whose name the bridge has too."""

    model: Model
    theirs: dict[str, Tensor]
    ours: Trace

    def both(self, name: str) -> tuple[Tensor, Tensor]:
        """Ours and theirs at a TransformerLens name."""
        return self.ours[name], self.theirs[name]


def hook(name: str) -> str:
    """The name without its block: ``attn.hook_z``."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


@cache
def seen(name: str) -> Seen:
    hf, ids = build(recipes()[name])
    model = Model(hf, name=name)
    theirs = load_file(FOLDER / f"{name}.safetensors")
    want = [text for text in theirs if from_transformer_lens(text) and not missing(model, text)]
    return Seen(model, theirs, model.trace(ids, want=[*want, "L*.attn.q", "L*.attn.k"]))


def missing(model: Model, text: str) -> bool:
    try:
        model.expand(text)
    except SiteMissingError:
        return True
    return False


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def open_entries(scores: Tensor) -> Tensor:
    """Where a score is not masked; what masks is -inf in some models and the least float in others."""
    return scores > torch.finfo(scores.dtype).min / 8


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_equal(name: str) -> None:
    run = seen(name)
    assert run.ours.logits is not None
    close(run.ours.logits, run.theirs["logits"])


@pytest.mark.parametrize("name", NAMES)
def test_every_shared_site_is_equal(name: str) -> None:
    run = seen(name)
    shared = [text for text in run.theirs if text != "logits" and name not in DIFFERENT.get(hook(text), ())]
    assert len(shared) >= 2 * 8, "hardly anything is compared"
    for text in shared:
        ours, theirs = run.both(text)
        if hook(text) == "attn.hook_attn_scores":
            assert torch.equal(open_entries(ours), open_entries(theirs)), text
            ours, theirs = (x.masked_fill(~open_entries(x), 0) for x in (ours, theirs))
        assert ours.shape == theirs.shape, text
        torch.testing.assert_close(
            ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda found, text=text: f"{name} {text}: {found}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_no_site_goes_without_comparison(name: str) -> None:
    run = seen(name)
    for kind in TRANSFORMER_LENS:
        for layer in range(run.model.n_layers):
            text = transformer_lens(kind, layer)
            assert text in run.theirs or missing(run.model, text), text


@pytest.mark.parametrize("kind", TRANSFORMER_LENS)
def test_every_name_is_proved_by_a_model(kind: str) -> None:
    texts = {kind: transformer_lens(kind, 1), "after rotary": AFTER_ROTARY.get(kind, "").format(layer=1)}
    for text in filter(None, texts.values()):
        proofs = [name for name in NAMES if text in seen(name).theirs and name not in DIFFERENT.get(hook(text), ())]
        assert proofs, text


@pytest.mark.parametrize("kind", TRANSFORMER_LENS)
def test_names_go_there_and_back(kind: str) -> None:
    site = Site.parse(transformer_lens(kind, 1))
    assert (site.kind, str(site)) == (kind, f"L1.{kind}" if site.layers else kind)
    assert KEPT.fullmatch(transformer_lens(kind, 1)), "the oracle does not keep it"


# -- the differences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ROTARY - NORM_ON_QUERIES))
@pytest.mark.parametrize("side", ["q", "k"])
def test_hook_q_and_hook_k_are_before_the_rotation(name: str, side: str) -> None:
    ours, theirs = seen(name).both(f"blocks.1.attn.hook_{side}")
    close(ours[:, 0], theirs[:, 0])  # position 0 is rotated by no angle
    close(ours.norm(dim=-1), theirs.norm(dim=-1))
    assert (ours[:, 1:] - theirs[:, 1:]).abs().amax() > 1e-2


@pytest.mark.parametrize("name", sorted(NORM_ON_QUERIES))
@pytest.mark.parametrize("side", ["q", "k"])
def test_hook_q_and_hook_k_are_before_the_norm_on_queries_too(name: str, side: str) -> None:
    run = seen(name)
    ours, theirs = run.both(f"blocks.1.attn.hook_{side}")
    attention = run.model.hf.get_submodule("model.layers.1.self_attn")
    flat = theirs.flatten(2) if name == "olmo2" else theirs  # over all heads together, or over each
    with torch.no_grad():
        normed = attention.get_submodule(f"{side}_norm")(flat).reshape(theirs.shape)
    close(ours[:, 0], normed[:, 0])
    assert (ours[:, 0] - theirs[:, 0]).abs().amax() > 1e-2


def test_hook_q_of_opt_is_before_it_is_scaled() -> None:
    ours, theirs = seen("opt").both("blocks.1.attn.hook_q")
    close(ours, theirs * theirs.shape[-1] ** -0.5)


@pytest.mark.parametrize("name", ["gptj", "opt", "gpt_neo"])
def test_hook_attn_scores_can_hold_the_pattern(name: str) -> None:
    run = seen(name)
    close(run.ours["L1.attn.pattern"], run.theirs["blocks.1.attn.hook_attn_scores"])


def test_heads_of_latent_attention_lie_elsewhere() -> None:
    run = seen("deepseek_v3")
    for side in "qkv":
        ours, theirs = run.both(f"blocks.1.attn.hook_{side}")
        close(ours, theirs.transpose(1, 2))
        assert ours.shape != theirs.shape
    ours, theirs = run.both("blocks.1.attn.hook_z")
    close(ours.flatten(2), theirs.flatten(2))
    assert ours.shape != theirs.shape
    for side in "qk":
        ours, theirs = run.both(f"blocks.1.attn.hook_rot_{side}")
        close(ours[..., -theirs.shape[-1] :], theirs.expand(-1, -1, ours.shape[2], -1))


def test_scores_of_gpt_oss_differ_by_one_number_per_row() -> None:
    ours, theirs = seen("gpt_oss").both("blocks.1.attn.hook_attn_scores")
    shown = open_entries(ours)
    assert torch.equal(shown, open_entries(theirs))
    assert (ours - theirs)[shown].abs().amax() > 0.1
    shift = (ours - theirs).masked_fill(~shown, float("nan"))
    close(shift.nan_to_num(), shift.nanmean(-1, keepdim=True).expand_as(shift).masked_fill(~shown, 0))
    close(ours.softmax(-1), theirs.softmax(-1))


def test_hook_embed_of_bloom_is_behind_a_norm() -> None:
    run = seen("bloom")
    ours, theirs = run.both("hook_embed")
    with torch.no_grad():
        close(run.model.hf.get_submodule("transformer.word_embeddings_layernorm")(ours), theirs)
    close(run.ours["L0.resid_pre"], theirs)


def test_hook_embed_of_granite_is_behind_its_multiplier() -> None:
    run = seen("granite")
    ours, theirs = run.both("hook_embed")
    close(ours * run.model.hf.config.embedding_multiplier, theirs)
    close(run.ours["L0.resid_pre"], theirs)


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_the_mlp_hooks_of_a_mixture_are_not_one_mlps(name: str) -> None:
    run = seen(name)
    for text in ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_post"):
        with pytest.raises(SiteMissingError, match="expert"):
            run.model.trace(torch.tensor([[1, 2]]), want=text)
    close(run.ours["L1.mlp.out"], run.theirs["blocks.1.mlp.hook_post"])


@pytest.mark.parametrize(
    ("name", "norm", "offset"),
    [("gpt2", "transformer.ln_f", 0), ("llama", "model.norm", 0), ("gemma2", "model.norm", 1)],
)
def test_hook_normalized_is_before_the_norms_scale(name: str, norm: str, offset: int) -> None:
    run = seen(name)
    weights = dict(run.model.hf.get_submodule(norm).named_parameters())
    scaled = run.theirs["ln_final.hook_normalized"] * (weights["weight"].detach() + offset)
    close(run.ours["final_norm"], scaled + weights["bias"].detach() if "bias" in weights else scaled)


def test_hook_normalized_names_no_site() -> None:
    with pytest.raises(SiteSyntaxError):
        Site.parse("ln_final.hook_normalized")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *((name, f"blocks.1.attn.hook_{side}") for name in sorted(ROTARY) for side in "qk"),
        ("opt", "blocks.1.attn.hook_q"),
    ],
)
def test_a_name_that_means_another_tensor_is_refused(name: str, text: str) -> None:
    model = seen(name).model
    for asked in ({"want": f"L0.resid_pre, {text}"}, {"do": Zero(text)}):
        with pytest.raises(SiteMissingError, match=r"before layer 1 .* 'L1\.attn\.[qk]' is what attention uses"):
            model.trace(torch.tensor([[1, 2]]), **asked)
