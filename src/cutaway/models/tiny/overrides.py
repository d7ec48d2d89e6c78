"""What inspection cannot infer: the attributes to set, per class of configuration.

``OVERRIDES`` are set in the tiny configuration, over what the rules chose; ``a__b`` reaches attribute ``b`` of the
sub-configuration ``a``, where its class is shared with other models. ``DEFAULTS`` go into the default configuration
that the rules look at.
"""

from __future__ import annotations

from typing import Any

from cutaway.models.tiny.rules import (
    EXPERT_MLP,
    EXPERTS,
    EXPERTS_USED,
    FIRST_SPECIAL,
    IMAGE,
    PATCH,
    TEXT,
    TOWER,
    VOCAB,
    WINDOW,
)

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
MROPE = {**ROPE, "mrope_section": [4, 2, 2]}
CODES = [FIRST_SPECIAL + i for i in range(8)]  # tokens that spell the eight codes of an image quantiser
SPARE, SPARE_TOO = VOCAB - 1, VOCAB - 2  # ids that no other token of the same configuration has

DEFAULTS: dict[str, dict[str, Any]] = {
    # Without these the default has no vision tower.
    "Gemma4Config": {"vision_config": {}},
    "Gemma4UnifiedConfig": {"vision_config": {}},
}

OVERRIDES: dict[str, dict[str, Any]] = {
    # --- Hybrids whose default has one kind of layer: softmax attention in the middle.
    "BambaConfig": {"attn_layer_indices": [1]},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "Lfm2Config": {"layer_types": ["conv", "full_attention", "conv"]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention", "conv"]},
    # --- Read left to right.
    "BigBirdConfig": {"attention_type": "original_full"},
    "BigBirdPegasusConfig": {"attention_type": "original_full"},
    "XLMConfig": {"causal": True},
    "XLNetConfig": {"attn_type": "uni"},
    # --- Lists and dimensions that must agree with each other.
    "CohereCompassTextConfig": {  # rotary parameters per kind of layer
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": MROPE, "full_attention": MROPE},
    },
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "Dots3NoteTextConfig": {  # sliding layers have heads of their own: head_dim = qk_nope_head_dim + qk_rope_head_dim
        "head_dim": 24,
        "per_layer_config": {
            2: {
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "q_lora_rank": 24,
                "kv_lora_rank": 32,
                "head_dim": 24,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
            }
        },
    },
    "GPTNeoConfig": {"attention_types": [[["global", "local", "global"], 1]], "window_size": WINDOW},
    "Gemma3nTextConfig": {  # the last layers reuse the keys and values of the last layer of their kind before them
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [TEXT.mlp] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
        "hidden_size_per_layer_input": 16,
    },
    "Glm5NextTextConfig": {"index_kpool": 2},  # divides index_topk
    "Mamba2Config": {"num_heads": 8, "head_dim": 16},  # 8 x 16 = twice the width
    "ReformerConfig": {  # chunks divide the prompt; a fixed seed, so that equal inputs fall into equal buckets
        "axial_pos_embds_dim": (16, 48),
        "axial_pos_shape": (8, 16),
        "hash_seed": 0,
        "num_buckets": 4,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "UnlimitedOcrTextConfig": {"num_key_value_heads": TEXT.heads},  # its own attention takes no fewer
    "Step3p7TextConfig": {
        "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "xLSTMConfig": {"hidden_size": 128, "embedding_dim": 128},  # keys are rounded up to 64, half of the width
    # --- Read by the model, missing in its default configuration.
    "DbrxAttentionConfig": {"rope_theta": 10_000.0, "clip_qkv": 8.0},
    "DiffusionGemmaTextConfig": {
        "num_experts": EXPERTS,
        "top_k_experts": EXPERTS_USED,
        "moe_intermediate_size": EXPERT_MLP,
    },
    "InstructBlipVideoConfig": {"video_token_index": SPARE},
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": SPARE},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": SPARE},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "XmodConfig": {"default_language": "en_XX"},
    # --- Ids are (batch, position) as everywhere else: one codebook; bytes hashed into a small table.
    "MusicgenDecoderConfig": {"num_codebooks": 1},
    "MusicgenMelodyDecoderConfig": {"num_codebooks": 1},
    # Blt's own cache asks the configuration for a number of layers that it does not have.
    "BltConfig": {"encoder_hash_byte_group_vocab": 64, "use_cache": False},
    "RoCBertConfig": {
        "shape_vocab_size": VOCAB,
        "pronunciation_vocab_size": VOCAB,
        "shape_embed_dim": 16,
        "pronunciation_embed_dim": 16,
    },
    # --- Image and text.
    "AriaConfig": {"projector_patch_to_query_dict": {16: 4}, "max_value_projector_patch_to_query_dict": 4},
    # How a code of the quantiser is spelled in the vocabulary.
    "ChameleonConfig": {
        "vocabulary_map": {"<image>": SPARE, **{f"IMGIMG{chr(ord('A') + i)}Z": code for i, code in enumerate(CODES)}}
    },
    "Emu3Config": {
        "vocabulary_map": {
            "<image>": SPARE,
            "<|extra_200|>": SPARE_TOO,
            **{f"<|visual token {i:06d}|>": code for i, code in enumerate(CODES)},
        }
    },
    # Sections for height, width and time; experts for text and for images.
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [40, 24],
        "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]},
    },
    "Florence2VisionConfig": {
        "embed_dim": (8, 16, 16, 32),
        "num_heads": (1, 2, 2, 4),
        "num_groups": (1, 2, 2, 4),
        "depths": (1, 1, 1, 1),
        "projection_dim": TEXT.width,
    },
    "Gemma4UnifiedVisionConfig": {"mm_embed_dim": TEXT.width, "mm_posemb_size": 16, "output_proj_dims": TEXT.width},
    "Granite4VisionConfig": {  # the Q-Former has one head per 64 channels of the tower
        "vision_config__hidden_size": 64,
        "deepstack_layer_map": [[1, 0], [2, 1]],
        "spatial_target_layers": [2],
        "downsample_rate": "2/4",
    },
    # Pixel shuffling puts 2 x 2 patches side by side: four times the width enters the adapter.
    "Llama4VisionConfig": {"intermediate_size": 4 * TOWER.width},
    "MuseGlimmerConfig": {"out_hidden_size": 4 * TOWER.width},
    "MuseSparkConfig": {"out_hidden_size": 4 * TOWER.width},
    "MuseSparkAudioConfig": {
        "patch_sizes": (4, 2, 2, 2),
        "hidden_sizes": (8, 8, 16, 16),
        "depths": (1, 1, 1, 1),
        "num_hidden_layers": 4,
    },
    "Molmo2AdapterConfig": {"vision_feature_layer": [1, 0]},
    "Molmo2VisionConfig": {"image_size": [IMAGE, IMAGE], "num_position_embeddings": 16},
    "PaddleOCRTextConfig": {"rope_parameters": MROPE},
    # The decoder's cross-attention projects the image from its own width.
    "Pix2StructConfig": {"vision_config__hidden_size": TEXT.width, "vision_config__d_kv": TEXT.head_dim},
    # hidden_size here is the width that the tower hands to the text; embed_dim is its own.
    "Qwen2VLVisionConfig": {"hidden_size": TEXT.width, "embed_dim": TOWER.width},
    # Windows in pixels: 2 x 2 patches.
    "Exaone4_5_VisionConfig": {"window_size": 2 * PATCH},
    "Qwen2_5OmniVisionEncoderConfig": {"window_size": 2 * PATCH},
    "Qwen2_5_VLVisionConfig": {"window_size": 2 * PATCH},
    "VipLlavaConfig": {"vision_feature_layers": (-2, 1)},
}

# Classes that no inputs of their own can run, and why.
DRAFTS = "it drafts tokens for another model, whose hidden states, keys and values it takes instead of a prompt"
CANNOT = {"Gemma4AssistantForCausalLM": DRAFTS, "Gemma4UnifiedAssistantForCausalLM": DRAFTS}
