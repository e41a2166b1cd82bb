"""A small LLaVA, built on the spot: stock classes of transformers, untrained weights, nothing downloaded."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

__all__ = ["IMAGE_TOKEN", "small_llava"]

IMAGE_TOKEN = "<image>"
"""Stands for the image in a prompt."""

_IMAGE_SIZE, _PATCH_SIZE = 168, 14
_SPECIAL = ("<pad>", "<s>", "</s>", IMAGE_TOKEN)
_CHAT_TEMPLATE = """
{%- for message in messages -%}
{{ message.role | upper }}: {% for part in message.content -%}
{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}
{%- endfor %} {% endfor %}
{%- if add_generation_prompt %}ASSISTANT:{% endif %}"""


def small_llava(seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Build a small, untrained LLaVA and its processor.

    The model sees 168 x 168 pixels as 12 x 12 image tokens and has 8 decoder layers of width 256, in float32 and eval
    mode. The processor pads images to squares and splits text into bytes, so it takes any image and any text.

    Parameters
    ----------
    seed : int
        Of the weights. The global random state stays as it is.

    Returns
    -------
    model : transformers.LlavaForConditionalGeneration
        Not patched.
    processor : transformers.LlavaProcessor
        With a chat template of the form ``USER: <image> ... ASSISTANT:``.

    Examples
    --------
    >>> model, processor = small_llava()
    >>> model.config.text_config.num_hidden_layers
    8
    >>> processor.decode(processor(text="café").input_ids[0], skip_special_tokens=True)
    'café'
    """
    tokenizer = _byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(_config(tokenizer)).float().eval()
    model.generation_config.suppress_tokens = _unprintable(tokenizer)
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size={"height": _IMAGE_SIZE, "width": _IMAGE_SIZE}, do_pad=True, do_center_crop=False),
        tokenizer,
        patch_size=_PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )
    return model, processor


def _unprintable(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Control characters and halves of letters, which an untrained model would answer in."""
    printable = {tokenizer.convert_tokens_to_ids("Ġ" if code == 32 else chr(code)) for code in range(32, 127)}
    return sorted(set(range(len(tokenizer))) - printable - {tokenizer.eos_token_id})


def _config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=_IMAGE_SIZE,
        patch_size=_PATCH_SIZE,
    )
    width = 256
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=4096,
        # At the usual 0.02, attention in a model this narrow would be the same everywhere.
        initializer_range=width**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    )


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = TemplateProcessing("<s> $A", "<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )
