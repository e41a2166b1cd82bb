"""How each family reads its image from a context: one line a family."""

import math
from collections.abc import Callable
from typing import Any

from flexkit.errors import UnsupportedModelError
from flexkit.patching.context.arrangements import AtTokens, ByRow, Frames, InSequence, RealOnes
from flexkit.patching.context.carriers import Carrier, Door, Held, Keyword, Tag
from flexkit.patching.context.padding import Padding
from flexkit.patching.context.page import Page
from flexkit.patching.context.patches import Patches
from flexkit.patching.context.pictures import Pictures
from flexkit.patching.context.readers import LearnedQueries, Words
from flexkit.patching.geometry.base import Geometry
from flexkit.patching.geometry.patches import merged_by_stages

__all__ = ["CONTEXTS"]

_Q_FORMER = "qformer.encoder.layer.*.crossattention.attention"

_decoder = Words("decoder_")
_learned = LearnedQueries()
_q_former = Pictures(_Q_FORMER, "encoder_hidden_states", prefix=1, reader=_learned, carrier=Door("qformer"))

_idefics = Pictures(
    "model.gated_cross_attn_layers.*.cross_attn",
    "key_value_states",
    prefix=1,
    arrangement=ByRow(),
    reader=Words(seen="image_attention_mask"),
)
_idefics_resampler = Pictures(
    "model.perceiver_resampler.blocks.*.0",
    "context",
    prefix=1,
    arrangement=RealOnes(black_too=True),
    reader=_learned,
    carrier=Held(),
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
    return Pictures(sites, source, prefix=_CLASS_TOKENS[encoder], cell=_merged_patch, reader=_decoder, carrier=carrier)


CONTEXTS: dict[str, Geometry | Callable[[Any], Geometry]] = {
    "aria": Pictures(
        "model.multi_modal_projector.cross_attn",
        "key_value_states",
        padding=Padding("pixel_mask", whole_cells=False),
        reader=_learned,
        carrier=Held(),
    ),
    "blip": Pictures(
        "text_decoder.bert.encoder.layer.*.crossattention.self",
        "encoder_hidden_states",
        prefix=1,
        carrier=Tag("text_decoder"),
    ),
    "blip-2": _q_former,
    "deepseek_ocr2": Pictures(
        "model.vision_tower.vision_encoder.layers.*.self_attn",
        "hidden_states",
        cell=lambda config: 4 * config.vision_config.sam_config.patch_size,  # two convolutions of stride 2
        norm="input_layernorm",
        encoder="model.vision_tower.vision_encoder",
        arrangement=InSequence(),
        overview_only="prepare the prompt with flexkit.FlexProcessor",
        reader=LearnedQueries(behind_image=True),
        carrier=Door("model.vision_tower.vision_encoder"),
    ),
    "florence2": Pictures(
        "model.language_model.decoder.layers.*.encoder_attn",
        "key_value_states",
        prefix=1,
        cell=lambda config: math.prod(config.vision_config.patch_stride),
        arrangement=AtTokens(lambda config: config.image_token_id),
        reader=_decoder,
    ),
    "git": Pictures("git.encoder.layer.*.attention.self", "hidden_states", prefix=1, reader=Words(image_in_front=True)),
    "idefics": lambda config: _idefics_resampler if config.use_resampler else _idefics,
    "idefics2": Pictures(
        "model.connector.perceiver_resampler.layers.*.self_attn",
        "context",
        norm="input_context_norm",
        arrangement=RealOnes(),
        padding=Padding("pixel_attention_mask", whole_cells=True),
        reader=_learned,
        carrier=Door("model.connector.perceiver_resampler"),
    ),
    "instructblip": _q_former,
    "instructblipvideo": Pictures(
        _Q_FORMER,
        "encoder_hidden_states",
        prefix=1,
        arrangement=Frames(),
        reader=_learned,
        carrier=Door("qformer"),
    ),
    "kosmos-2": Pictures(
        "image_to_text_projection.x_attn",
        "encoder_hidden_states",
        prefix=1,
        reader=_learned,
        carrier=Door("image_to_text_projection.x_attn"),
    ),
    "kosmos-2.5": Patches(
        "image_to_text_projection.x_attn",
        "encoder_hidden_states",
        reader=_learned,
        carrier=Door("image_to_text_projection.x_attn"),
    ),
    "mllama": Pictures(
        "model.language_model.layers.*.cross_attn",
        "cross_attention_states",
        prefix=1,
        arrangement=ByRow(),
        reader=Words(seen="cross_attention_mask"),
    ),
    "pix2struct": Patches(
        "decoder.layer.*.encoder_decoder_attention.attention",
        "key_value_states",
        reader=_decoder,
        carrier=Tag("decoder"),
    ),
    "pp_formulanet": Pictures(
        "model.decoder.layers.*.encoder_attn",
        "key_value_states",
        cell=lambda config: 4 * config.vision_config.patch_size,  # two convolutions of stride 2
        reader=_decoder,
    ),
    "t5gemma2": Pictures(
        "model.decoder.layers.*.self_attn",
        "encoder_hidden_states",
        cell=lambda config: int(
            config.encoder.vision_config.image_size / math.sqrt(config.encoder.mm_tokens_per_image)
        ),
        arrangement=AtTokens(lambda config: config.encoder.image_token_index, from_end=True),
        reader=_decoder,
        behind_text=True,
    ),
    "udop": Page(
        "decoder.block.*.layer.1.EncDecAttention",
        "key_value_states",
        cell=lambda config: config.patch_size,
        reader=_decoder,
    ),
    "vision-encoder-decoder": _vision_encoder_decoder,
}
"""A model type's context, or what chooses one by the model's config."""
