"""Models that take the patches of a picture, of any number, and something that says where they lie."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.zoo.family import END, IMAGE, START, VIDEO, Family, Grid, Views, frame_by_frame
from tests.zoo.tiny import TEXT, VISION, config

__all__ = ["RAW"]

_SMALL: dict[str, Any] = {**VISION, "patch_size": 4}
_AUDIO = 95
_SLIDING: dict[str, Any] = dict(
    layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=8, global_head_dim=16
)
_INKLING: dict[str, Any] = dict(
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    swa_head_dim=8,
    layer_types=["hybrid_sliding", "hybrid"] * 2,
    sliding_window_size=16,
    d_rel=4,
    rel_extent=12,
    log_scaling_n_floor=128,
    conv_kernel_size=3,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
)
"""Biases of relative positions, and short convolutions over keys and values."""


def _gemma4(**text: Any) -> tf.PreTrainedConfig:
    return config(
        "gemma4",
        text_config={
            **TEXT,
            **_SLIDING,
            **text,
            "use_bidirectional_attention": "vision",
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": TEXT["vocab_size"],
        },
        vision_config={
            **_SMALL,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        **_GEMMA_TOKENS,
    )


def _gemma4_unified() -> tf.PreTrainedConfig:
    return config(
        "gemma4_unified",
        text_config={**TEXT, **_SLIDING},
        vision_config={
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 16,
            "output_proj_dims": 16,
            "mm_posemb_size": 64,
        },
        **_GEMMA_TOKENS,
    )


_GEMMA_TOKENS: dict[str, Any] = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=_AUDIO, boi_token_id=START, eoi_token_id=END
)


def _lfm2_vl() -> tf.PreTrainedConfig:
    return config(
        "lfm2_vl",
        text_config={**TEXT, "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
        vision_config={**_SMALL, "num_patches": 16, "vision_use_head": False},
        projector_hidden_size=24,
        image_token_id=IMAGE,
    )


def _nemotron_h_omni() -> tf.PreTrainedConfig:
    return config(
        "nemotron_h_omni",
        text_config={
            **TEXT,
            "layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention"],
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
        vision_config={
            **_SMALL,
            "image_size": 16,
            "max_img_size": 32,
            "video_temporal_patch_size": 2,
        },
        projector_hidden_size=24,
        vision_hidden_size=VISION["hidden_size"],
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=_AUDIO,
    )


def _with_small_states(model: tf.PreTrainedModel) -> None:
    """Mamba sums its states in float32 and normalises what is read off them: large ones lose small outputs."""
    for name, parameter in model.named_parameters():
        if name.endswith("mixer.conv1d.weight"):
            parameter.data.mul_(0.3)


def _fuyu() -> tf.PreTrainedConfig:
    text = {name: size for name, size in TEXT.items() if name not in ("num_key_value_heads", "head_dim")}
    size = TEXT["hidden_size"]
    return config("fuyu", text_config=text, hidden_size=size, patch_size=4, image_size=8, image_token_id=IMAGE)


def _inkling2() -> tf.PreTrainedConfig:
    return config(
        "inkling2",
        text_config={**TEXT, **_INKLING, "unpadded_vocab_size": TEXT["vocab_size"], "n_layers_per_attn_res_block": 2},
        vision_config={
            **_SMALL,
            "posemb_grid_size": 4,
            "projection_hidden_dim": 24,
            "text_hidden_size": TEXT["hidden_size"],
        },
        image_token_id=IMAGE,
    )


def _inkling() -> tf.PreTrainedConfig:
    return config(
        "inkling_mm_model",
        text_config={**TEXT, **_INKLING, "n_shared_experts": 1},
        # As many layers as the patch has scales; with fewer, choosing among the scales needs scipy.
        vision_config={"patch_size": 2, "num_hidden_layers": 3},
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 8},
        image_token_id=IMAGE,
        audio_token_id=_AUDIO,
        image_bos_token_id=START,
    )


def _positioned(side: Callable[[Any], int], patches: int = 1) -> Views:
    """Patches of ``side`` pixels, with the column and row of each; ``patches`` of them a side for every cell."""

    def views(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
        rows, columns = (patches * cells * factor for cells, factor in zip(grid, zoom, strict=True))
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
        pixels = torch.rand(1, rows * columns, 3 * side(settings.vision_config) ** 2)
        return {"pixel_values": pixels, "image_position_ids": places[None]}

    return views


def _in_frames(views: Views) -> Views:
    """The same for every frame of a video, and how many frames it has."""

    def frames(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
        shown = [views(settings, grid[1:], zoom[1:]) for _ in range(grid[0] * zoom[0])]
        return {
            "pixel_values_videos": torch.cat([frame["pixel_values"] for frame in shown]),
            "video_position_ids": torch.cat([frame["image_position_ids"] for frame in shown]),
            "num_frames_per_video": torch.tensor([len(shown)]),
        }

    return frames


def _shaped(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """Four patches a cell, as many rows and columns as the shape says, and a mask of those that are no padding."""
    shape = 2 * torch.tensor([grid]) * torch.tensor(zoom)
    count = int(shape.prod())
    return {
        "pixel_values": torch.randn(1, count, 3 * settings.vision_config.patch_size**2),
        "spatial_shapes": shape,
        "pixel_attention_mask": torch.ones(1, count, dtype=torch.long),
    }


def _flat(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """Four patches a cell, the patches of all images in one list."""
    shape = 2 * torch.tensor([grid]) * torch.tensor(zoom)
    return {
        "pixel_values": torch.rand(int(shape.prod()), 3 * settings.vision_config.patch_size**2),
        "image_grid_hw": shape,
    }


def _large_patches(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """One patch a cell, as a little picture with its colours last."""
    shape = torch.tensor([[1, grid[0] * zoom[0], grid[1] * zoom[1]]])
    side = settings.vision_config.patch_size * settings.vision_config.spatial_merge_size
    return {"pixel_values": torch.randn(int(shape.prod()), side, side, 3), "image_grid_thw": shape}


def _bare_patches(side: Callable[[Any], int], patch: Callable[[int], tuple[int, ...]]) -> tuple[Views, Views]:
    """One patch a cell; only the high-res view says how many pixels high and wide the picture is."""

    def low(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
        cells = grid[0] * zoom[0] * grid[1] * zoom[1]
        return {"pixel_values": torch.randn(cells, *patch(side(settings)))}

    def high(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
        size = side(settings) * torch.tensor([grid]) * torch.tensor(zoom)
        return {**low(settings, grid, zoom), "image_sizes": size}

    return high, low


def _family(
    name: str,
    build: Callable[[], tf.PreTrainedConfig],
    high_res: Views,
    low_res: Views | None = None,
    **settings: Any,
) -> Family:
    return Family(name, build, high_res, low_res, grid=(2, 3), any_grid=True, **settings)


def _as_named(settings: Any, inputs: dict[str, Tensor], counts: Sequence[int]) -> dict[str, Tensor]:
    """Fuyu called its patches otherwise in earlier versions of transformers."""
    accepted = inspect.signature(tf.FuyuForCausalLM.forward).parameters
    patches = "pixel_values" if "pixel_values" in accepted else "image_patches"
    return {patches if name == "pixel_values" else name: value for name, value in inputs.items()}


def _lines(grid: Grid) -> list[int]:
    """A line's end behind every row."""
    return [*[*[IMAGE] * grid[1], END] * grid[0]]


_TAKES_FRAMES = (
    "num_frames_per_video" in inspect.signature(tf.Gemma4ForConditionalGeneration.forward).parameters or None
)
"""Earlier versions of transformers stack videos of as many frames."""
_POOLED = _positioned(lambda vision: vision.patch_size, patches=2)
_WHOLE = _positioned(lambda vision: vision.model_patch_size)

RAW = (
    _family("gemma4", _gemma4, _POOLED, video=_TAKES_FRAMES and _in_frames(_POOLED), video_tokens=frame_by_frame),
    _family("gemma4-shared", lambda: _gemma4(num_kv_shared_layers=2, attention_k_eq_v=True), _POOLED),
    _family(
        "gemma4_unified",
        _gemma4_unified,
        _WHOLE,
        video=_TAKES_FRAMES and _in_frames(_WHOLE),
        video_tokens=frame_by_frame,
    ),
    _family("lfm2_vl", _lfm2_vl, _shaped),
    _family("nemotron_h_omni", _nemotron_h_omni, _flat, prepare=_with_small_states),
    _family(
        "fuyu",
        _fuyu,
        *_bare_patches(lambda settings: settings.patch_size, lambda side: (3 * side**2,)),
        tokens=_lines,
        finish=_as_named,
    ),
    _family("inkling2", _inkling2, _large_patches),
    _family(
        "inkling_mm_model",
        _inkling,
        *_bare_patches(lambda settings: settings.vision_config.patch_size, lambda side: (2, side, side, 3)),
    ),
)
