"""Processors small enough for tests, built without a hub, whose token ids fit tiny models.

Every builder takes the ids of its special tokens, which must lie inside of the vocabulary of ``vocab_size``
tokens; the other tokens are the words ``w4``, ``w5``, ... at the ids 4, 5, ... Text is split at spaces, so
that ``"w7 w8"`` is two tokens, and is preceded by ``<s>``.
"""

from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
)
from transformers.video_processing_utils import BaseVideoProcessor

CHAT_TEMPLATE = """
{%- for message in messages -%}
{{ message.role }}:
{%- if message.content is string %} {{ message.content }}
{%- else %}
{%- for block in message.content %} {% if block.type == 'image' %}IMAGE{% else %}{{ block.text }}{% endif %}
{%- endfor %}{% endif %} w9 {% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""


def tiny_tokenizer(special: dict[str, tuple[str, int]], vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A tokenizer of words; ``special`` maps attribute names, as ``image_token``, to a token and its id."""
    vocab = {f"w{i}": i for i in range(4, vocab_size)} | {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for token, index in special.values():
        vocab.pop(f"w{index}", None)
        vocab[token] = index
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = TemplateProcessing("<s> $A", "<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={name: token for name, (token, _) in special.items()},
    )


def tiny_llava_processor(
    image_size: int = 28,
    patch_size: int = 14,
    pad: bool = False,
    siglip: bool = False,
    image_token_id: int = 300,
    vocab_size: int = 320,
) -> LlavaProcessor:
    """LLaVA with ``(image_size / patch_size)²`` tokens for an image, written ``<image>`` in the prompt.

    The image processor is CLIP's (shortest edge and centre crop), LLaVA's own with ``pad`` (padding to a
    square), or with ``siglip`` SigLIP's (resizing to a square; a tower without a class token).
    """
    crop = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    if siglip:
        image_processor: Any = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    elif pad:
        image_processor = LlavaImageProcessorPil(**crop, do_pad=True)
    else:
        image_processor = CLIPImageProcessorPil(**crop)
    return LlavaProcessor(
        image_processor,
        tiny_tokenizer({"image_token": ("<image>", image_token_id)}, vocab_size),
        patch_size=patch_size,
        vision_feature_select_strategy="full" if siglip else "default",
        num_additional_image_tokens=0 if siglip else 1,
        chat_template=CHAT_TEMPLATE.replace("IMAGE", "<image>"),
    )


def tiny_gemma3_processor(
    image_size: int = 56,
    tokens_per_image: int = 4,
    image_token_id: int = 300,
    boi_token_id: int = 302,
    eoi_token_id: int = 303,
    vocab_size: int = 320,
) -> Gemma3Processor:
    """Gemma 3 with ``tokens_per_image`` tokens for an image, written ``<start_of_image>`` in the prompt."""
    special = {
        "image_token": ("<image_soft_token>", image_token_id),
        "boi_token": ("<start_of_image>", boi_token_id),
        "eoi_token": ("<end_of_image>", eoi_token_id),
    }
    return Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": image_size, "width": image_size}),
        tiny_tokenizer(special, vocab_size),
        image_seq_length=tokens_per_image,
        chat_template=CHAT_TEMPLATE.replace("IMAGE", "<start_of_image>"),
    )


def tiny_qwen_processor(
    patch_size: int = 14,
    merge_size: int = 2,
    min_pixels: int = 56 * 56,
    max_pixels: int = 112 * 112,
    image_token_id: int = 300,
    video_token_id: int = 301,
    vision_start_token_id: int = 302,
    vision_end_token_id: int = 303,
    vocab_size: int = 320,
    **image_settings: Any,
) -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL; an image is written ``<|vision_start|> <|image_pad|> <|vision_end|>`` in the prompt.

    A low-res view has between ``min_pixels`` and ``max_pixels``, and one token for every
    ``patch_size · merge_size`` pixels squared.
    """
    special = {
        "image_token": ("<|image_pad|>", image_token_id),
        "video_token": ("<|video_pad|>", video_token_id),
        "vision_start_token": ("<|vision_start|>", vision_start_token_id),
        "vision_end_token": ("<|vision_end|>", vision_end_token_id),
    }
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
        patch_size=patch_size,
        merge_size=merge_size,
        **image_settings,
    )
    # Without torchvision there is no video processor that passes the check of classes.
    with mock.patch.object(Qwen2_5_VLProcessor, "check_argument_for_proper_class"):
        return Qwen2_5_VLProcessor(
            image_processor,
            tiny_tokenizer(special, vocab_size),
            BaseVideoProcessor(),
            chat_template=CHAT_TEMPLATE.replace("IMAGE", "<|vision_start|> <|image_pad|> <|vision_end|>"),
        )


class SquareFrames(BaseVideoProcessor):
    """Frames of one size, made by torch alone: the video processors of transformers need torchvision."""

    do_resize = do_rescale = True
    resample = 2
    do_normalize = do_convert_rgb = False

    def resize(self, videos: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
        frames = videos.flatten(0, -4).float()
        made = torch.nn.functional.interpolate(frames, (size.height, size.width), mode="bilinear", antialias=True)
        return made.unflatten(0, videos.shape[:-3])

    def rescale_and_normalize(self, videos: torch.Tensor, do_rescale: bool, factor: float, *_: Any) -> torch.Tensor:
        return videos * factor


def tiny_onevision_processor(
    video_processor: Any = None,
    image_size: int = 42,
    image_token_id: int = 300,
    video_token_id: int = 301,
    vocab_size: int = 320,
) -> LlavaOnevisionProcessor:
    """LLaVA-OneVision with 9 tokens for an image, ``<image>``, and 4 for each frame of a ``<video>``."""
    special = {"image_token": ("<image>", image_token_id), "video_token": ("<video>", video_token_id)}
    square = {"height": image_size, "width": image_size}
    with mock.patch.object(LlavaOnevisionProcessor, "check_argument_for_proper_class"):
        return LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessorPil(size=square),
            tiny_tokenizer(special, vocab_size),
            video_processor or SquareFrames(size=square),
            num_image_tokens=9,
            vision_feature_select_strategy="full",
        )


IMAGE_PROMPT = {
    "llava": "<image>",
    "gemma3": "<start_of_image>",
    "qwen": "<|vision_start|> <|image_pad|> <|vision_end|>",
}
