"""What inspection cannot infer: per configuration class, the attributes to set.

``inner`` reaches into sub-configurations whose class is shared with other models. ``default`` goes into building the default configuration as well (needed where a bare default does not validate);
``set`` only into the tiny one, over what the rules chose.
"""

from __future__ import annotations

from typing import Any

from cutaway.models.tiny.rules import FIRST_SPECIAL, IMAGE, PATCH, TEXT, TOWER, WINDOW

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
MROPE = {**ROPE, "mrope_section": [4, 2, 2]}

OVERRIDES: dict[str, dict[str, dict[str, Any]]] = {
    # The default has linear attention only; one layer in the middle gets softmax attention.
    "BambaConfig": {"set": {"attn_layer_indices": [1]}},
    "GraniteMoeHybridConfig": {"set": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}},
    "Lfm2MoeConfig": {"set": {"layer_types": ["conv", "full_attention", "conv"]}},
    # Read left to right.
    "BigBirdConfig": {"set": {"attention_type": "original_full"}},
    "BigBirdPegasusConfig": {"set": {"attention_type": "original_full"}},
    "XLMConfig": {"set": {"causal": True}},
    "XLNetConfig": {"set": {"attn_type": "uni"}},
    # Rotary parameters per kind of layer, which the default leaves out.
    # Its own cache asks the configuration for a number of layers that it does not have.
    "BltConfig": {"set": {"encoder_hash_byte_group_vocab": 64, "use_cache": False}},
    "CohereCompassTextConfig": {
        "set": {
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "rope_parameters": {"sliding_attention": MROPE, "full_attention": MROPE},
        }
    },
    "DbrxAttentionConfig": {"set": {"rope_theta": 10_000.0, "clip_qkv": 8.0}},
    # The sliding layers have heads of their own size: head_dim = qk_nope_head_dim + qk_rope_head_dim.
    "Dots3NoteTextConfig": {
        "set": {
            "head_dim": 24,
            "per_layer_config": {
                2: {
                    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 24, "kv_lora_rank": 32,
                    "head_dim": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
                }  # fmt: skip
            },
        }
    },
    "GPTNeoConfig": {"set": {"attention_types": [[["global", "local", "global"], 1]], "window_size": WINDOW}},
    # The last layers reuse the keys and values of the last layer of their kind before them.
    "Gemma3nTextConfig": {
        "set": {
            "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [TEXT.mlp] * 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "laurel_rank": 8, "hidden_size_per_layer_input": 16,
        }
    },
    "Mamba2Config": {"set": {"num_heads": 8, "head_dim": 16}},
    # One codebook: the ids are then (batch, position) as everywhere else.
    "MusicgenDecoderConfig": {"set": {"num_codebooks": 1}},
    "MusicgenMelodyDecoderConfig": {"set": {"num_codebooks": 1}},
    "Qwen4ExpTextConfig": {
        "set": {
            "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
            "indexer_compress_ratio": 2, "hc_lowrank": 8,
        }
    },
    # A fixed hash seed, so that the same input falls in the same buckets; chunks that divide the prompt.
    "ReformerConfig": {
        "set": {
            "axial_pos_embds_dim": (16, 48), "axial_pos_shape": (8, 16), "hash_seed": 0, "num_buckets": 4,
            "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
        }
    },
    "RoCBertConfig": {"set": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64, "shape_embed_dim": 16, "pronunciation_embed_dim": 16}},
    "XmodConfig": {"set": {"default_language": "en_XX"}},
    # Keys are rounded up to 64, half of the width.
    "xLSTMConfig": {"set": {"hidden_size": 128, "embedding_dim": 128}},
    # hidden_size here is the width that the tower hands to the text; embed_dim is its own
    "Qwen2VLVisionConfig": {"set": {"hidden_size": TEXT.width, "embed_dim": TOWER.width}},
    # --- image and text ---
    "AriaConfig": {"set": {"projector_patch_to_query_dict": {16: 4}, "max_value_projector_patch_to_query_dict": 4}},
    # The words of the picture: how a code of the quantiser is spelled in the vocabulary.
    "ChameleonConfig": {
        "set": {"vocabulary_map": {"<image>": 127, **{f"IMGIMG{chr(65 + i)}Z": FIRST_SPECIAL + i for i in range(8)}}}
    },
    "Emu3Config": {
        "set": {
            "vocabulary_map": {
                "<image>": 127, "<|extra_200|>": 126,
                **{f"<|visual token {i:06d}|>": FIRST_SPECIAL + i for i in range(8)},
            }  # fmt: skip
        }
    },
    "DeepseekOcr2TextConfig": {"set": {"mlp_layer_types": ["dense", "sparse", "sparse"]}},
    "DiffusionGemmaTextConfig": {"set": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 40}},
    "Ernie4_5_VLMoeTextConfig": {
        "set": {"moe_intermediate_size": [40, 24], "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}}
    },
    "Florence2VisionConfig": {
        "set": {
            "embed_dim": (8, 16, 16, 32), "num_heads": (1, 2, 2, 4), "num_groups": (1, 2, 2, 4), "depths": (1, 1, 1, 1),
            "projection_dim": TEXT.width,
        }  # fmt: skip
    },
    "Gemma4Config": {"default": {"vision_config": {}}},
    "Gemma4UnifiedConfig": {"default": {"vision_config": {}}},
    "Gemma4UnifiedVisionConfig": {
        "set": {"mm_embed_dim": TOWER.width, "mm_posemb_size": 16, "output_proj_dims": TEXT.width}
    },
    "Glm5NextTextConfig": {"set": {"index_kpool": 2}},
    "Granite4VisionConfig": {
        "set": {
            "deepstack_layer_map": [[1, 0], [2, 1]], "spatial_target_layers": [2], "downsample_rate": "2/4",
            "vision_feature_select_strategy": "full",
        },
        # One head of the Q-Former per 64 channels.
        "inner": {"vision_config__hidden_size": 64},
    },
    # Pixel shuffling puts 2 x 2 patches side by side: 4 x 32 channels enter the adapter.
    "Llama4VisionConfig": {"set": {"intermediate_size": 4 * TOWER.width}},
    "Molmo2AdapterConfig": {"set": {"vision_feature_layer": [1, 0]}},
    "Molmo2VisionConfig": {"set": {"image_size": [IMAGE, IMAGE]}},
    "MuseSparkAudioConfig": {
        "set": {"patch_sizes": (4, 2, 2, 2), "hidden_sizes": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_hidden_layers": 4}
    },
    "Step3p7TextConfig": {
        "set": {"sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    },
    # Windows of 16 pixels: 2 x 2 patches.
    **dict.fromkeys(
        ("Qwen2_5_VLVisionConfig", "Exaone4_5_VisionConfig", "HyperCLOVAXVisionV2VisionConfig",
         "Qwen2_5OmniVisionEncoderConfig"),
        {"set": {"window_size": 2 * PATCH}},
    ),
    # Asked for by the model, missing in its configuration.
    "Qwen2_5OmniThinkerConfig": {"set": {"vision_start_token_id": 127}},
    "Qwen3OmniMoeThinkerConfig": {"set": {"vision_start_token_id": 127}},
    "VipLlavaConfig": {"set": {"vision_feature_layers": (-2, 1)}},
}
