"""The small model that searches scenes: a LLaVA of stock classes, with a tokenizer and a processor of its own."""

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SegformerConfig,
)

from flexkit.visual_search.choices import LETTERS
from flexkit.visual_search.questions import WORDS

__all__ = [
    "CELLS",
    "IMAGE_TOKEN",
    "LOW_RES",
    "ZOOM",
    "add_layer",
    "add_letters",
    "build_model",
    "build_processor",
    "token_ids",
]

IMAGE_TOKEN = "<image>"
"""Stands for the image in a prompt."""
LOW_RES, ZOOM = 64, 3
"""Side of the low-res view in pixels, and how much larger the high-res view is."""

CELLS = 8
"""Image tokens along a side."""

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", IMAGE_TOKEN)
_TOKENS = {token: index for index, token in enumerate((*_SPECIAL, *WORDS))}
_CHAT_TEMPLATE = """
{%- macro written(content) %}{% if content is string %}{{ content }}{% else %}
{%- for part in content %}{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %}
{%- endif %}{% endmacro %}
{%- for message in messages -%}
{%- if message.role == 'assistant' %}{% generation %}{{ written(message.content) }}</s>{% endgeneration %}
{%- else %}{{ written(message.content) }}{% endif %} {% endfor %}"""


def build_model(layers: int = 4, width: int = 96, seed: int = 0) -> LlavaForConditionalGeneration:
    """Build the model, untrained.

    It sees a scene as 8 x 8 image tokens. Its vision tower is a SegFormer: strided convolutions that overlap find
    digits a few pixels high wherever they stand, which patches cut side by side hardly do.

    Parameters
    ----------
    layers, width : int
        Of the language model.
    seed : int
        Of the weights. The global random state stays as it is.

    Returns
    -------
    transformers.LlavaForConditionalGeneration
        In float32 and eval mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(_config(layers, width)).eval()
        # With the tower's own initialisation, made for wide ones, digits stay unread for thousands of steps.
        for module in model.model.vision_tower.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    return model


def _config(layers: int, width: int) -> LlavaConfig:
    widths = [24, 48, 96]
    vision = SegformerConfig(
        image_size=LOW_RES,
        patch_size=2,
        hidden_size=widths[-1],
        num_encoder_blocks=3,
        hidden_sizes=widths,
        depths=[1, 1, 1],
        patch_sizes=[5, 5, 3],
        strides=[2, 2, 2],
        sr_ratios=[8, 4, 1],
        mlp_ratios=[2, 2, 2],
        num_attention_heads=[1, 2, 4],
        hidden_dropout_prob=0.0,
        drop_path_rate=0.0,
        reshape_last_stage=False,
    )
    text = LlamaConfig(
        vocab_size=len(_TOKENS),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=width**-0.5,
        pad_token_id=_TOKENS["<pad>"],
        bos_token_id=_TOKENS["<s>"],
        eos_token_id=_TOKENS["</s>"],
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=_TOKENS[IMAGE_TOKEN],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


def build_processor() -> LlavaProcessor:
    """Build the processor: images of any size are padded to a square and become 64 x 64 pixels, questions become words.

    Returns
    -------
    transformers.LlavaProcessor
        With a chat template; words that the model does not know become ``<unk>``.
    """
    core = Tokenizer(models.WordLevel(_TOKENS, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z0-9<>/ ]"), " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = TemplateProcessing("<s> $A", "<s> $A $B", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )
    return LlavaProcessor(
        LlavaImageProcessorPil(
            size={"height": LOW_RES, "width": LOW_RES},
            do_pad=True,
            do_center_crop=False,
            image_mean=[0.5] * 3,
            image_std=[0.25] * 3,
        ),
        tokenizer,
        patch_size=LOW_RES // CELLS,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=_CHAT_TEMPLATE,
    )


def add_layer(model: LlavaForConditionalGeneration) -> None:
    """Put one more layer behind those of the language model; before it is trained it changes nothing.

    Parameters
    ----------
    model : transformers.LlavaForConditionalGeneration
        Changed in place; the global random state draws the layer's weights.
    """
    language: Any = model.model.language_model
    layer = type(language.layers[0])(language.config, len(language.layers))
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=language.config.initializer_range)
    for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
        nn.init.zeros_(last.weight)
    language.layers.append(layer)
    language.config.num_hidden_layers += 1


def add_letters(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Give a model and its tokenizer tokens for the letters of options, which are capitals.

    Parameters
    ----------
    model : transformers.LlavaForConditionalGeneration
        Changed in place; the global random state draws the embeddings, as those of all other tokens were drawn.
    processor : transformers.LlavaProcessor
        Changed in place.
    """
    # All other words lose their capitals, and small letters are columns.
    letters = [AddedToken(letter, single_word=True, normalized=False) for letter in LETTERS]
    processor.tokenizer.add_tokens(letters)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)


def token_ids(words: Iterable[str]) -> list[int]:
    """The tokens of words that the model knows.

    Parameters
    ----------
    words : iterable of str
        One token each.
    """
    return [_TOKENS[word] for word in words]
