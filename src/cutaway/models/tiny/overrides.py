"""What inspection cannot infer: per configuration class, the attributes to set.

``default`` goes into building the default configuration as well (needed where a bare default does not validate);
``set`` only into the tiny one, over what the rules chose.
"""

from __future__ import annotations

from typing import Any

from cutaway.models.tiny.rules import TEXT, TOWER, WINDOW

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
}
