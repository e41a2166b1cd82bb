"""Qwen-VL and what is built like it: patches in the order of the cells."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.zoo.family import END, IMAGE, START, VIDEO, Grid, frame_by_frame
from tests.zoo.grids import HYBRID, INTERLEAVED, grid_family
from tests.zoo.pixels import clip, patches
from tests.zoo.tiny import MOE, MROPE, ROPE, VISION

__all__ = ["QWEN"]

_INTERLEAVED = {"rope_parameters": INTERLEAVED}
_PARTIAL = {"rope_parameters": {**INTERLEAVED, "partial_rotary_factor": 0.5}, "head_dim": 16}
_WINDOWS = {"window_size": 56, "fullatt_block_indexes": [1]}
_DEEPSTACK = {"patch_size": 16, "deepstack_visual_indexes": [0, 1]}
_OMNI_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "audio_token_id": 94,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "audio_start_token_id": 95,
}
_AUDIO = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "output_dim": 32,
    "num_mel_bins": 8,
}


def _with_merge_sizes(config: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    return {**patches(config, grid, zoom), "image_merge_sizes": torch.tensor([2])}


def _clip_with_merge_sizes(config: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    return {**clip(config, grid, zoom), "video_merge_sizes": torch.tensor([2])}


def _timed(config: Any, inputs: dict[str, Tensor], images: Sequence[int]) -> dict[str, Tensor]:
    """Seconds between the frames of every video."""
    grids = inputs.get("video_grid_thw", ())
    return inputs | ({"video_second_per_grid": torch.ones(len(grids))} if len(grids) else {})


QWEN = (
    grid_family("qwen2_vl", {"rope_parameters": MROPE}, {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}),
    grid_family("qwen3_vl", _INTERLEAVED, _DEEPSTACK, video_sequence=frame_by_frame),
    grid_family("qwen3_vl_moe", {**_INTERLEAVED, **MOE}, _DEEPSTACK, video_sequence=frame_by_frame),
    grid_family("qwen3_5", {**_PARTIAL, **HYBRID}, {"patch_size": 16}, video_sequence=frame_by_frame),
    grid_family(
        "qwen3_5_moe",
        {**_PARTIAL, **HYBRID, **MOE, "shared_expert_intermediate_size": 16},
        {"patch_size": 16},
        video_sequence=frame_by_frame,
    ),
    grid_family("cosmos3_omni", _INTERLEAVED, _DEEPSTACK, video_sequence=frame_by_frame),
    grid_family(
        "cosmos3_edge",
        {"rope_parameters": MROPE},
        tower={**VISION, "patch_size": 16},
        projector_hidden_size=24,
        video_sequence=frame_by_frame,
    ),
    grid_family(
        "cohere_compass",
        {
            "rope_parameters": {kind: INTERLEAVED for kind in ("full_attention", "sliding_attention")},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 16,
        },
        _DEEPSTACK,
        video_sequence=frame_by_frame,
    ),
    grid_family(
        "exaone4_5",
        {"model_type": "exaone4", "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16},
        {**_WINDOWS, "num_key_value_heads": 2},
    ),
    grid_family("hyperclovax_vision_v2", vision=_WINDOWS),
    grid_family(
        "video_llama_3", {"model_type": "qwen2"}, tower=VISION, high_res=_with_merge_sizes, video=_clip_with_merge_sizes
    ),
    grid_family(
        "lfm3_vl",
        {
            "rope_parameters": {kind: ROPE for kind in ("full_attention", "sliding_attention")},
            "layer_types": ["conv", "full_attention", "conv", "sliding_attention"],
            "sliding_window": 16,
        },
        {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2},
        tower={**VISION, "patch_size": 16},
        projector_hidden_size=24,
    ),
    grid_family(
        "qwen2_5_omni_thinker",
        {"rope_parameters": MROPE},
        _WINDOWS,
        tokens=_OMNI_TOKENS,
        audio_config=_AUDIO,
        finish=_timed,
    ),
    grid_family(
        "qwen3_omni_moe_thinker",
        {**_INTERLEAVED, **MOE},
        _DEEPSTACK,
        tokens=_OMNI_TOKENS,
        audio_config={**_AUDIO, "downsample_hidden_size": 8},
        finish=_timed,
    ),
)
