"""How large a tiny model is: one number per attribute *name*, whatever the architecture.

Hugging Face configurations use a few hundred names for a dozen ideas (``hidden_size``, ``n_embd``, ``d_model``: the
width of the residual stream). Listing the names once shrinks every configuration that uses them, so that a new
architecture usually needs nothing here. ``shrink.py`` applies the rules; ``overrides.py`` has what they cannot say.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """The dimensions of one part of a model (its text, vision or audio tower)."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    layers: int


TEXT = Size(width=64, heads=4, kv_heads=2, head_dim=16, mlp=96, layers=3)
TOWER = Size(width=32, heads=4, kv_heads=4, head_dim=8, mlp=48, layers=2)

VOCAB = 128
# Ids: [0, FIRST_WORD) stay what the default configuration calls them (pad, bos, eos), [FIRST_WORD, FIRST_SPECIAL) are
# words, the rest is for the special tokens that lie outside of the tiny vocabulary (image placeholders and the like).
FIRST_WORD, FIRST_SPECIAL = 64, 104
POSITIONS = 512
WINDOW = 6  # shorter than the prompt, so that a sliding window is seen to slide
EXPERTS, EXPERTS_USED, EXPERT_MLP = 4, 2, 40
IMAGE, PATCH = 32, 8  # pixels: a 4 x 4 grid of patches

# A sub-configuration is a tower (vision or audio) when its name contains one of these.
TOWER_NAMES = ("vision", "audio", "sam_config", "backbone", "vq_config", "image", "adapter_config")

# name -> field of Size. A value of None in the default configuration stays None.
SIZED = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "emb_dim", "embed_dim", "embedding_size", "embedding_dim",
         "input_embedding_size", "hidden_size_global", "output_embedding_size", "word_embed_proj_dim",
         "lru_width", "moe_hidden_size", "pooler_output_size"),
        "width",
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
         "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
         "swa_num_attention_heads", "num_sliding_attention_heads", "resampler_n_heads", "resampler_heads",
         "linear_num_heads", "num_query_groups"),
        "heads",
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"), "kv_heads"
    ),
    **dict.fromkeys(
        ("head_dim", "kv_channels", "d_kv", "d_head", "dim_head", "attention_head_size", "v_head_dim",
         "qk_nope_head_dim", "swa_head_dim", "resampler_head_dim", "resampler_dim_head",
         "global_head_dim", "swa_v_head_dim", "linear_head_dim"),
        "head_dim",
    ),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "dff", "dim_ff",
         "d_inner", "ffn_hidden_size", "feed_forward_size", "mlp_dim", "intermediate_size_mlp",
         "dense_intermediate_size", "alignment_intermediate_size", "projection_intermediate_size",
         "shared_intermediate_size"),
        "mlp",
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers", "depth", "decoder_layers",
         "encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks"),
        "layers",
    ),
}  # fmt: skip

# name -> value, where the default configuration has a positive number.
FIXED: dict[str, float] = {
    "vocab_size": VOCAB, "decoder_vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "unpadded_vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS, "n_positions": POSITIONS, "n_ctx": POSITIONS, "max_seq_len": POSITIONS,
    "max_target_positions": POSITIONS, "max_source_positions": POSITIONS, "context_length": POSITIONS,
    "original_max_position_embeddings": POSITIONS, "model_max_length": POSITIONS,
    "num_position_embeddings": 64,
    "sliding_window": WINDOW, "attention_chunk_size": 8, "attention_window_size": WINDOW, "local_attention": WINDOW,
    "sliding_window_size": WINDOW,
    # mixtures of experts
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS,
    "moe_intermediate_size": EXPERT_MLP, "shared_expert_intermediate_size": EXPERT_MLP,
    "expert_ffn_hidden_size": EXPERT_MLP, "moe_shared_expert_intermediate_size": EXPERT_MLP,
    "shared_experts_intermediate_size": EXPERT_MLP, "share_expert_dim": EXPERT_MLP,
    "first_k_dense_replace": 1, "num_dense_layers": 1,
    # low-rank and indexed attention
    "q_lora_rank": 24, "kv_lora_rank": 16, "o_lora_rank": 16, "qk_rope_head_dim": 8,
    "index_head_dim": 16, "index_n_heads": 4, "index_topk": 4,
    # state-space and linear attention
    "mamba_d_state": 8, "mamba_d_head": 16, "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_head_dim": 16,
    "mamba_headdim": 16, "mamba_d_ssm": 128, "mamba_dt_rank": 4, "time_step_rank": 4, "state_size": 8,
    "ssm_state_size": 8, "mamba_chunk_size": 8, "chunk_size": 8, "n_groups": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    # scales: far enough from 1 to be noticed, near enough to leave the logits their spread
    "logit_scale": 0.5, "logits_mup_width_multiplier": 2.0,
    # rotary
    "rotary_dim": 8, "query_pre_attn_scalar": 16,
    # images
    "image_size": IMAGE, "patch_size": PATCH, "mm_tokens_per_image": 4, "image_seq_length": 16, "num_image_tokens": 16,
    "vision_soft_tokens_per_image": 4, "num_query_tokens": 4, "resampler_n_latents": 4, "resampler_num_latents": 4,
    "canvas_length": 12,
    # what joins the vision tower to the text: the width of the text
    "out_hidden_size": TEXT.width, "text_hidden_size": TEXT.width, "output_dim": TEXT.width,
    "projection_dim": TEXT.width, "projector_hidden_size": TEXT.mlp, "projection_hidden_size": TOWER.width,
    "encoder_hidden_size": TOWER.width, "image_text_hidden_size": TEXT.width, "adapter_out_dim": TEXT.width,
    "adapter_in_dim": TOWER.width, "adapter_input_size": TOWER.width, "vision_output_dim": TEXT.width,
    "projector_input_dim": TEXT.width, "projector_output_dim": TEXT.width, "decoder_hidden_size": TEXT.width,
    "patch_embed_hidden_size": 3 * PATCH**2, "vision_hidden_size": TOWER.width, "max_img_size": 4 * IMAGE,
    "max_image_size": 4 * IMAGE, "latent_query_num": 4, "image_token_embed_dim": TOWER.width,
    # convolutions and quantisers of towers
    "output_channels": TOWER.width, "base_channels": TOWER.width, "window_size": 2, "num_embeddings": 8,
    "codebook_size": 8, "downsample_hidden_size": 16, "nemo_conv_channels": 32, "ext_pw_out_channel": 32,
    "depthwise_separable_out_channel": 32, "post_conv_in_channels": 32, "post_conv_mid_channels": 32,
    "post_conv_out_channels": 32, "position_embedding_size": 16, "num_global_layers": 1, "zero_expert_num": 2,
}  # fmt: skip

FIXED_LISTS = {
    "image_grid_pinpoints": [[2 * IMAGE, IMAGE], [IMAGE, 2 * IMAGE]],
    "downsample_channels": [TOWER.width, TOWER.width],
    "channel_multiplier": [1, 1, 1, 1],  # halves the image three times: one code per patch
}

# name -> largest value: kept when the default is smaller.
AT_MOST = {
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts"),
        EXPERTS_USED,
    ),
    "n_group": 2, "num_expert_group": 2, "topk_group": 1,
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
}  # fmt: skip

# Needed by the model although the default configuration leaves them out.
WHEN_NONE = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": EXPERTS_USED}
SIZED_WHEN_NONE = ("head_dim", "num_key_value_heads")

# What special tokens are called; the stem before the ending names the token.
SPECIAL_ENDINGS = ("_token_id", "_token_index", "_token_ids", "_patch_id", "_newline_id")
# An id for the image placeholder, where the default configuration leaves it to the processor.
IMAGE_TOKEN_NAMES = ("image_token_id", "image_token_index")

# Only in the outermost configuration: an encoder of the BERT kind reads left to right.
FLAGS = {"is_decoder": True}

# Lists of layer indices (not one entry per layer): the last layer of the tiny model is kept.
LAYER_INDEX_LISTS = (
    "moe_layers", "cross_attention_layers", "deepstack_visual_indexes", "fullatt_block_indexes",
    "global_attn_indexes", "hybrid_layer_ids", "ple_layer_ids", "intermediate_layers_indices", "rope_scaling_layers",
)  # fmt: skip
