"""Which geometry each family of models has: one line a family; and which have none."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexkit.errors import UnsupportedModelError
from flexkit.grids import Grid
from flexkit.patching.context.arrangements import AtTokens, ByRow, Frames, RealOnes, WithQueries
from flexkit.patching.context.beside import Beside
from flexkit.patching.context.carriers import Carrier, Door, Held, Keyword, Tag
from flexkit.patching.context.flattened_patches import FlattenedPatches
from flexkit.patching.context.pictures import Padding, Page, Pictures
from flexkit.patching.context.readers import LearnedQueries, Words
from flexkit.patching.geometry.any_size import SizedImages
from flexkit.patching.geometry.base import Geometry
from flexkit.patching.geometry.fixed_grid import (
    AnyRes,
    FixedGrid,
    TwoSizes,
    encode_overviews,
    encode_pages,
    encode_pooled,
    encode_projected,
    encode_samples,
    merged_by_stages,
    merged_patches,
    selected_patches,
    timm_patches,
    timm_size,
)
from flexkit.patching.geometry.patch_lists import (
    BarePatches,
    DynamicGrid,
    LinedGrid,
    ListedPatches,
    MergedGrid,
    PaddedPatches,
    PatchStrip,
    PositionedPatches,
)
from flexkit.patching.geometry.videos import (
    FixedFrames,
    MarkedVideo,
    MergedVideo,
    PatchedVideo,
    PositionedVideo,
    UnmarkedGrid,
)

__all__ = ["FAMILIES", "REFUSED"]


_UNCUT = "call the processor with crop_to_patches=False"
_UNPANNED = "call the processor with do_pan_and_scan=False"
_UNSPLIT = "call the processor with do_image_splitting=False"
_UNTILED = "pass pixel_values[:, :1], and give each image one image token for every cell and one for the newline"


def _stride(config: Any) -> int:
    """Pixels a side that an encoder to discrete codes makes one code of; it halves the picture between its levels."""
    return int(2 ** (len(config.vq_config.channel_multiplier) - 1))


def _muse_side(config: Any) -> int:
    """Side of a cell in patches."""
    return int(config.vision_config.merge_size)


def _pooled(config: Any) -> int:
    """Side of a cell in patches (Gemma 4)."""
    return int(config.vision_config.pooling_kernel_size)


def _pooled_frames(config: Any) -> int:
    """Tokens of a frame (LLaVA-NeXT-Video)."""
    side = math.isqrt(merged_patches(config, merged_by_stages(config.vision_config)))
    return int(side // config.spatial_pool_stride) ** 2


def _newline_after_all(grid: Grid) -> Tensor:
    """The cells and one newline (LLaVA-NeXT)."""
    cells = grid[0] * grid[1]
    return torch.arange(cells + 1) < cells


def _line_ends(grid: Grid) -> Tensor:
    """A line end after every row of cells (Emu3)."""
    return (torch.arange(grid[1] + 1) < grid[1]).repeat(grid[0])


def _newline_after_rows(grid: Grid) -> Tensor:
    """A newline after every row, and a separator after the image (Unlimited-OCR)."""
    return pad(_line_ends(grid), (0, 1))


_patches = FixedGrid(merged_patches)
_selected = FixedGrid(selected_patches)
_anyres = AnyRes(
    selected_patches,
    encode=encode_overviews,
    layout=_newline_after_all,
    overview_only=_UNTILED,
    video=FixedFrames(_pooled_frames),
)
_cohere = FixedGrid(lambda config: merged_patches(config, config.downsample_factor), overview_only=_UNCUT)
_dynamic = DynamicGrid(video=PatchedVideo())
_across = DynamicGrid(video=PatchedVideo(apart=False))  # towers that attend from frame to frame
_glm = UnmarkedGrid(video=MarkedVideo())
_gemma = FixedGrid(lambda config: config.mm_tokens_per_image, overview_only=_UNPANNED)
_idefics = FixedGrid(
    lambda config: merged_patches(config, config.scale_factor), encode=encode_samples, overview_only=_UNSPLIT
)
_internvl = FixedGrid(lambda config: merged_patches(config, round(1 / config.downsample_ratio)), overview_only=_UNCUT)
_muse = DynamicGrid(_muse_side, PatchedVideo(_muse_side))
_ovis = FixedGrid(lambda config: merged_patches(config, config.vision_config.hidden_stride), overview_only=_UNCUT)
_sam = FixedGrid(lambda config: merged_patches(config, 4), overview_only=_UNCUT)  # two convolutions of stride 2
_pixtral = SizedImages(lambda config: config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1))
_strip = PatchStrip()

# What is one of a kind.
_onevision = AnyRes(
    selected_patches,
    encode=encode_overviews,
    layout=_newline_after_all,
    overview_only=_UNTILED,
    video=FixedFrames(lambda config: merged_patches(config, 2), behind=1),
)
_video_llava = FixedGrid(selected_patches, video=FixedFrames(merged_patches, before=1))
_ernie = DynamicGrid(video=PatchedVideo(frames=lambda config: config.vision_config.temporal_merge_size, apart=False))
_granite4 = AnyRes(
    lambda config: int(merged_patches(config) * Fraction(config.downsample_rate) ** 2),
    encode=encode_overviews,
    layout=_newline_after_all,
    overview_only=_UNTILED,
)
_chameleon = FixedGrid(
    lambda config: (config.vq_config.resolution // _stride(config)) ** 2,
    size=lambda config: config.vq_config.resolution,
)
_emu3 = SizedImages(_stride, layout=_line_ends)
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
    lambda config: merged_patches(config, 4, config.vision_config.sam_config),
    size=lambda config: config.vision_config.sam_config.image_size,
    layout=_newline_after_rows,
    overview_only=_UNCUT,
)


def _llava(config: Any) -> Geometry:
    return _pixtral if config.vision_config.model_type == "pixtral" else _selected


# Attention that reads the image from a context beside the sequence.
_Q_FORMER = "qformer.encoder.layer.*.crossattention.attention"

_decoder = Words("decoder_")
_learned = LearnedQueries()
_q_former = Pictures(Beside(_Q_FORMER, "encoder_hidden_states", reader=_learned, carrier=Door("qformer")), prefix=1)

_idefics_1 = Pictures(
    Beside("model.gated_cross_attn_layers.*.cross_attn", "key_value_states", reader=Words(seen="image_attention_mask")),
    prefix=1,
    arrangement=ByRow(),
)
_idefics_resampler = Pictures(
    Beside("model.perceiver_resampler.blocks.*.0", "context", reader=_learned, carrier=Held()),
    prefix=1,
    arrangement=RealOnes(black_too=True),
)

_BERT = ("decoder.*.encoder.layer.*.crossattention.self", "encoder_hidden_states", Keyword("decoder_"))
_BART = ("decoder.model.decoder.layers.*.encoder_attn", "key_value_states", Keyword("decoder_"))
_DECODERS: dict[str, tuple[str, str, Carrier]] = {
    "bart": _BART,
    "bert": _BERT,
    "gpt2": ("decoder.transformer.h.*.crossattention", "encoder_hidden_states", Tag("decoder")),
    "mbart": _BART,
    "roberta": _BERT,
    "trocr": ("decoder.model.decoder.layers.*.encoder_attn", "key_value_states", Tag("decoder")),
    "xlm-roberta": _BERT,
}
"""Of a vision encoder-decoder: where its decoder reads, by which argument, and how a call gets there."""
_CLASS_TOKENS = {"beit": 1, "deit": 2, "dinov2": 1, "donut-swin": 0, "swin": 0, "swinv2": 0, "vit": 1}
"""What its encoder puts in front of the cells."""


def _merged_patch(config: Any) -> int:
    """Side of a patch of the encoder, which may merge two by two between its stages."""
    return int(config.encoder.patch_size * merged_by_stages(config.encoder))


def _vision_encoder_decoder(config: Any) -> Geometry:
    encoder, decoder = config.encoder.model_type, config.decoder.model_type
    for kind, known in ((encoder, _CLASS_TOKENS), (decoder, _DECODERS)):
        if kind not in known:
            raise UnsupportedModelError(
                f"flexkit does not know {kind!r} in a vision encoder-decoder, but {list(known)}."
            )
    sites, source, carrier = _DECODERS[decoder]
    return Pictures(
        Beside(sites, source, reader=_decoder, carrier=carrier), prefix=_CLASS_TOKENS[encoder], cell=_merged_patch
    )


FAMILIES: dict[str, Geometry | Callable[[Any], Geometry]] = {
    "aya_vision": _cohere,
    "chameleon": _chameleon,
    "cohere2_vision": _cohere,
    "cohere_compass": _dynamic,
    "cosmos3_edge": _dynamic,
    "cosmos3_omni": _dynamic,
    "deepseek_vl": _patches,
    "deepseek_vl_hybrid": TwoSizes(),
    "dots3_note": _across,
    "emu3": _emu3,
    "ernie4_5_vl_moe": _ernie,
    "exaone4_5": _dynamic,
    "fast_vlm": FixedGrid(lambda config: config.image_seq_length, size=None),
    "fuyu": BarePatches(lambda config: config.patch_size),
    "gemma3": _gemma,
    "gemma3n": FixedGrid(lambda config: config.vision_soft_tokens_per_image, size=None),
    "gemma4": PositionedPatches(_pooled, PositionedVideo(_pooled)),
    "gemma4_unified": PositionedPatches(lambda config: 1, PositionedVideo(lambda config: 1)),
    "glm46v": _glm,
    "glm4v": _glm,
    "glm4v_moe": _glm,
    "glm5_next": _glm,
    "glm_ocr": _glm,
    "glmga": _glm,
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
    "llava_onevision": _onevision,
    "minicpm_ocr": _strip,
    "minicpmv4_6": _strip,
    "minicpmv4_7": _strip,
    "minimax_m3_vl": _across,
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
    "video_llama_3": MergedGrid(MergedVideo()),
    "video_llava": _video_llava,
    "vipllava": _patches,
    # Beside the sequence.
    "aria": Pictures(
        Beside("model.multi_modal_projector.cross_attn", "key_value_states", reader=_learned, carrier=Held()),
        padding=Padding("pixel_mask", whole_cells=False),
    ),
    "blip": Pictures(
        Beside(
            "text_decoder.bert.encoder.layer.*.crossattention.self",
            "encoder_hidden_states",
            carrier=Tag("text_decoder"),
        ),
        prefix=1,
    ),
    "blip-2": _q_former,
    "deepseek_ocr2": Pictures(
        Beside(
            "model.vision_tower.vision_encoder.layers.*.self_attn",
            "hidden_states",
            norm="input_layernorm",
            encoder="model.vision_tower.vision_encoder",
            reader=LearnedQueries(behind_image=True),
            carrier=Door("model.vision_tower.vision_encoder"),
        ),
        cell=lambda config: 4 * config.vision_config.sam_config.patch_size,
        arrangement=WithQueries(),
        overview_only="prepare the prompt with flexkit.FlexProcessor",
    ),
    "florence2": Pictures(
        Beside("model.language_model.decoder.layers.*.encoder_attn", "key_value_states", reader=_decoder),
        prefix=1,
        cell=lambda config: math.prod(config.vision_config.patch_stride),
        arrangement=AtTokens(lambda config: config.image_token_id),
    ),
    "git": Pictures(
        Beside("git.encoder.layer.*.attention.self", "hidden_states", reader=Words(image_in_front=True)), prefix=1
    ),
    "idefics": lambda config: _idefics_resampler if config.use_resampler else _idefics_1,
    "idefics2": Pictures(
        Beside(
            "model.connector.perceiver_resampler.layers.*.self_attn",
            "context",
            norm="input_context_norm",
            reader=_learned,
            carrier=Door("model.connector.perceiver_resampler"),
        ),
        arrangement=RealOnes(),
        padding=Padding("pixel_attention_mask", whole_cells=True),
    ),
    "instructblip": _q_former,
    "instructblipvideo": Pictures(
        Beside(_Q_FORMER, "encoder_hidden_states", reader=_learned, carrier=Door("qformer")),
        prefix=1,
        arrangement=Frames(),
    ),
    "kosmos-2": Pictures(
        Beside(
            "image_to_text_projection.x_attn",
            "encoder_hidden_states",
            reader=_learned,
            carrier=Door("image_to_text_projection.x_attn"),
        ),
        prefix=1,
    ),
    "kosmos-2.5": FlattenedPatches(
        Beside(
            "image_to_text_projection.x_attn",
            "encoder_hidden_states",
            reader=_learned,
            carrier=Door("image_to_text_projection.x_attn"),
        )
    ),
    "mllama": Pictures(
        Beside(
            "model.language_model.layers.*.cross_attn",
            "cross_attention_states",
            reader=Words(seen="cross_attention_mask"),
        ),
        prefix=1,
        arrangement=ByRow(),
    ),
    "pix2struct": FlattenedPatches(
        Beside(
            "decoder.layer.*.encoder_decoder_attention.attention",
            "key_value_states",
            reader=_decoder,
            carrier=Tag("decoder"),
        )
    ),
    "pp_formulanet": Pictures(
        Beside("model.decoder.layers.*.encoder_attn", "key_value_states", reader=_decoder),
        cell=lambda config: 4 * config.vision_config.patch_size,
    ),
    "t5gemma2": Pictures(
        Beside("model.decoder.layers.*.self_attn", "encoder_hidden_states", reader=_decoder, behind_text=True),
        cell=lambda config: int(
            config.encoder.vision_config.image_size / math.sqrt(config.encoder.mm_tokens_per_image)
        ),
        arrangement=AtTokens(lambda config: config.encoder.image_token_index, from_end=True),
    ),
    "udop": Page(
        Beside("decoder.block.*.layer.1.EncDecAttention", "key_value_states", reader=_decoder),
        cell=lambda config: config.patch_size,
    ),
    "vision-encoder-decoder": _vision_encoder_decoder,
}
"""A model type's geometry, or what chooses one by the model's config."""

REFUSED: dict[str, str] = {
    "diffusion_gemma": "its decoder denoises a block of tokens at once, so no position reads before it answers",
    "evolla": "it looks at proteins, not at images",
    "mistral4": "it is a language model without images",
    "pi0": "it is a policy for robots, which generates actions and no text",
}
"""Why a model type cannot be patched."""
