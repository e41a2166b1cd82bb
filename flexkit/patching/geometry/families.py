"""Which geometry each family of models has: one line a family; and which have none."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from flexkit.patching.geometry.any_res import AnyRes
from flexkit.patching.geometry.bare import BarePatches
from flexkit.patching.geometry.base import Geometry
from flexkit.patching.geometry.dynamic import DynamicGrid, LinedGrid, MergedGrid
from flexkit.patching.geometry.fixed import FixedGrid
from flexkit.patching.geometry.layouts import line_ends, newline_after_all, newline_after_rows
from flexkit.patching.geometry.patches import (
    merged_patches,
    selected_patches,
    timm_patches,
    timm_size,
    tower_patches,
)
from flexkit.patching.geometry.positioned import PositionedPatches
from flexkit.patching.geometry.shaped import ListedPatches, PaddedPatches
from flexkit.patching.geometry.sized import SizedImages
from flexkit.patching.geometry.strip import PatchStrip
from flexkit.patching.geometry.tiles import (
    encode_overviews,
    encode_pages,
    encode_pooled,
    encode_projected,
    encode_samples,
)
from flexkit.patching.geometry.two_sizes import TwoSizes

__all__ = ["FAMILIES", "REFUSED"]

_UNCUT = "call the processor with crop_to_patches=False"
_UNPANNED = "call the processor with do_pan_and_scan=False"
_UNSPLIT = "call the processor with do_image_splitting=False"
_UNTILED = "pass pixel_values[:, :1], and give each image one image token for every cell and one for the newline"


def _stride(config: Any) -> int:
    """Pixels a side that an encoder to discrete codes makes one code of; it halves the picture between its levels."""
    return int(2 ** (len(config.vq_config.channel_multiplier) - 1))


_patches = FixedGrid(merged_patches)
_selected = FixedGrid(selected_patches)
_anyres = AnyRes(selected_patches, encode=encode_overviews, layout=newline_after_all, overview_only=_UNTILED)
_cohere = FixedGrid(lambda config: merged_patches(config, config.downsample_factor), overview_only=_UNCUT)
_dynamic = DynamicGrid()
_gemma = FixedGrid(lambda config: config.mm_tokens_per_image, overview_only=_UNPANNED)
_idefics = FixedGrid(
    lambda config: merged_patches(config, config.scale_factor), encode=encode_samples, overview_only=_UNSPLIT
)
_internvl = FixedGrid(lambda config: merged_patches(config, round(1 / config.downsample_ratio)), overview_only=_UNCUT)
_muse = DynamicGrid(lambda config: config.vision_config.merge_size)
_ovis = FixedGrid(lambda config: merged_patches(config, config.vision_config.hidden_stride), overview_only=_UNCUT)
_sam = FixedGrid(lambda config: merged_patches(config, 4), overview_only=_UNCUT)  # two convolutions of stride 2
_pixtral = SizedImages(lambda config: config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1))
_strip = PatchStrip()

# What is one of a kind.
_granite4 = AnyRes(
    lambda config: int(merged_patches(config) * Fraction(config.downsample_rate) ** 2),
    encode=encode_overviews,
    layout=newline_after_all,
    overview_only=_UNTILED,
)
_chameleon = FixedGrid(
    lambda config: (config.vq_config.resolution // _stride(config)) ** 2,
    size=lambda config: config.vq_config.resolution,
)
_emu3 = SizedImages(_stride, layout=line_ends)
_granite_docling = FixedGrid(
    lambda config: merged_patches(config, config.vision_config.scale_factor), encode=encode_pages, overview_only=_UNCUT
)
_llama4 = FixedGrid(
    lambda config: merged_patches(config, round(1 / config.vision_config.pixel_shuffle_ratio)),
    encode=encode_projected,
    overview_only="call the processor with max_patches=1",
)
_molmo2 = FixedGrid(
    lambda config: merged_patches(config, 2),
    encode=encode_pooled,
    overview_only="keep the first crop of every image, its image tokens and its rows of image_token_pooling, and set "
    "image_grids[:, 2:] to 0",
)
_perception = FixedGrid(
    lambda config: timm_patches(config, config.projector_pooling_ratio),
    size=timm_size,
    encode=encode_samples,
    overview_only="call the processor with vision_input_type='vanilla'",
)
_step = FixedGrid(
    lambda config: merged_patches(config, 4),
    overview_only="give the processor images of at most the tower's size, no more than 1.5 times as long as wide",
)
_unlimited = FixedGrid(
    lambda config: tower_patches(config.vision_config.sam_config, 4),
    size=lambda config: config.vision_config.sam_config.image_size,
    layout=newline_after_rows,
    overview_only=_UNCUT,
)


def _llava(config: Any) -> Geometry:
    return _pixtral if config.vision_config.model_type == "pixtral" else _selected


FAMILIES: dict[str, Geometry | Callable[[Any], Geometry]] = {
    "aya_vision": _cohere,
    "chameleon": _chameleon,
    "cohere2_vision": _cohere,
    "cohere_compass": _dynamic,
    "cosmos3_edge": _dynamic,
    "cosmos3_omni": _dynamic,
    "deepseek_vl": _patches,
    "deepseek_vl_hybrid": TwoSizes(),
    "dots3_note": _dynamic,
    "emu3": _emu3,
    "ernie4_5_vl_moe": _dynamic,
    "exaone4_5": _dynamic,
    "fast_vlm": FixedGrid(lambda config: config.image_seq_length, size=None),
    "fuyu": BarePatches(lambda config: config.patch_size),
    "gemma3": _gemma,
    "gemma3n": FixedGrid(lambda config: config.vision_soft_tokens_per_image, size=None),
    "gemma4": PositionedPatches(lambda config: config.vision_config.pooling_kernel_size),
    "gemma4_unified": PositionedPatches(lambda config: 1),
    "glm46v": _dynamic,
    "glm4v": _dynamic,
    "glm4v_moe": _dynamic,
    "glm5_next": _dynamic,
    "glm_ocr": _dynamic,
    "glmga": _dynamic,
    "got_ocr2": _sam,
    "granite4_vision": _granite4,
    "granite_docling": _granite_docling,
    "hunyuan_vl": LinedGrid(),
    "hyperclovax_vision_v2": _dynamic,
    "idefics3": _idefics,
    "inkling2": DynamicGrid(lambda config: 1),  # its grids count cells
    "inkling_mm_model": BarePatches(lambda config: config.vision_config.patch_size),
    "internvl": _internvl,
    "janus": _patches,
    "kimi_k25": DynamicGrid(lambda config: config.vision_config.merge_kernel_size[0]),
    "lfm2_vl": PaddedPatches(lambda config: config.downsample_factor),
    "lfm3_vl": _dynamic,
    "lighton_ocr": _pixtral,
    "llama4": _llama4,
    "llava": _llava,
    "llava_next": _anyres,
    "llava_next_video": _anyres,
    "llava_onevision": _anyres,
    "minicpm_ocr": _strip,
    "minicpmv4_6": _strip,
    "minicpmv4_7": _strip,
    "minimax_m3_vl": _dynamic,
    "mistral3": _pixtral,
    "mistral_large4": _pixtral,
    "molmo2": _molmo2,
    "muse_glimmer": _muse,
    "muse_spark": _muse,
    "nemotron_h_omni": ListedPatches(lambda config: round(1 / config.downsample_ratio)),
    "ovis2": _ovis,
    "paddleocr_vl": _dynamic,
    "paligemma": _patches,
    "perception_lm": _perception,
    "pp_chart2table": _sam,
    "qianfan_ocr": _internvl,
    "qwen2_5_omni_thinker": _dynamic,
    "qwen2_5_vl": _dynamic,
    "qwen2_vl": _dynamic,
    "qwen3_5": _dynamic,
    "qwen3_5_moe": _dynamic,
    "qwen3_omni_moe_thinker": _dynamic,
    "qwen3_vl": _dynamic,
    "qwen3_vl_moe": _dynamic,
    "qwen4_exp": _dynamic,
    "shieldgemma2": _gemma,
    "smolvlm": _idefics,
    "step3p7": _step,
    "unlimited_ocr": _unlimited,
    "video_llama_3": MergedGrid(),
    "video_llava": _selected,
    "vipllava": _patches,
}
"""A model type's geometry, or what chooses one by the model's config."""

REFUSED: dict[str, str] = {
    "diffusion_gemma": "its decoder denoises a block of tokens at once, so no position reads before it answers",
    "evolla": "it looks at proteins, not at images",
    "mistral4": "it is a language model without images",
    "pi0": "it is a policy for robots, which generates actions and no text",
}
"""Why a model type cannot be patched."""
