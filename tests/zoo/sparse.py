"""Sparse attention: an indexer picks the few keys that a query sees, fewer than the prompts here have."""

from tests.zoo.family import IMAGE, VIDEO, frame_by_frame
from tests.zoo.glm import MARKS, marked
from tests.zoo.grids import HYBRID, INTERLEAVED, grid_family
from tests.zoo.tiny import MOE, VISION

__all__ = ["SPARSE"]

_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 8,  # with few, many keys score exactly 0, and ties are broken at random
    "index_head_dim": 8,
    "index_topk": 8,
}
_EXPERTS = {**MOE, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}

SPARSE = (
    grid_family(
        "qwen4_exp",
        {
            **MOE,
            **HYBRID,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "rope_parameters": {**INTERLEAVED, "partial_rotary_factor": 0.5},
            "head_dim": 16,
            "shared_expert_intermediate_size": 16,
            "hc_count": 2,
            "hc_lowrank": 8,
            "indexer_n_heads": 8,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
        {"patch_size": 16},
        video_sequence=frame_by_frame,
    ),
    grid_family(
        "glm5_next",
        {
            **_LATENT,
            **_EXPERTS,
            "qk_rope_head_dim": 0,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "mlp_layer_types": ["dense", "sparse"] * 2,
            "linear_num_heads": 2,
            "linear_head_dim": 8,
            "index_kpool": 2,
            "hc_mult": 2,
        },
        {"image_size": 56, "projection_intermediate_size": 24},
        tokens=MARKS,
        video_sequence=marked,
    ),
    grid_family(
        "minimax_m3_vl",
        {
            **MOE,
            "num_local_experts": 4,
            "dense_intermediate_size": 48,
            "shared_intermediate_size": 16,
            "mlp_layer_types": ["dense", "sparse"] * 2,
            "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_block_size": 4,
            "index_topk_blocks": 2,
            "index_local_blocks": 1,
        },
        tower=VISION,
        tokens={"image_token_index": IMAGE, "video_token_index": VIDEO},
        projector_hidden_size=24,
    ),
    grid_family(
        "dots3_note",
        {
            **_LATENT,
            **_EXPERTS,
            "qk_rope_head_dim": 4,
            "head_dim": 12,
            "layer_types": ["sliding_attention", "indexed_attention"] * 2,
            "mlp_layer_types": ["dense", "sparse"] * 2,
            "shared_experts_intermediate_size": 16,
            "sliding_window": 16,
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 2,
            "swa_q_lora_rank": 8,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 12,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 8,
        },
        {
            "mlp_layer_types": ["dense", "sparse"],
            "num_local_experts": 4,
            "moe_intermediate_size": 16,
            "adapter_in_dim": 16,
            "adapter_out_dim": 32,
        },
        tower=VISION,
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "downsample_hidden_size": 8,
            "adapter_input_size": 16,
            "adapter_out_dim": 32,
        },
    ),
)
