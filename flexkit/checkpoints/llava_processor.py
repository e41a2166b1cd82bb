"""The processor of a published FlexAttention checkpoint, which comes without one: pictures, prompt and placeholder."""

from os import PathLike
from typing import Any, Unpack

from transformers import AutoTokenizer, LlavaImageProcessorPil, LlavaProcessor, PreTrainedTokenizerBase

from flexkit.checkpoints.hub import HubOptions, fetched
from flexkit.checkpoints.llava_config import read_settings
from flexkit.checkpoints.vision import vision_settings
from flexkit.errors import CheckpointError, first_line

__all__ = ["load_llava_flexattn_processor"]

_IMAGE = "<image>"
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# LLaVA-1.5's, which the checkpoints were trained with: pictures first, each on a line of its own.
_CHAT_TEMPLATE = (
    """
{%- if messages[0].role == 'system' -%}
{{ messages[0].content if messages[0].content is string else messages[0].content[0].text }}
{%- else %}"""
    f"{_SYSTEM}"
    """{% endif %}
{%- for message in messages if message.role != 'system' -%}
{{ ' USER: ' if message.role == 'user' else ' ASSISTANT: ' }}
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content if part.type == 'image' %}<image>
{% endfor %}
{%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
{%- endif %}
{%- if message.role == 'assistant' %}</s>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %} ASSISTANT:{% endif %}"""
)


def load_llava_flexattn_processor(
    folder: str | PathLike[str],
    vision_config: Any = None,
    *,
    tokenizer: str | PathLike[str] | PreTrainedTokenizerBase | None = None,
    **hub: Unpack[HubOptions],
) -> LlavaProcessor:
    """Make the processor of a model that :func:`load_llava_flexattn` loads.

    It does to pictures what the published code does: they are padded to squares in the mean colour, and resized to the
    size of the vision tower. Its chat template is that of LLaVA-1.5 (``vicuna_v1``), and ``<image>`` is the one token
    of the model that the checkpoint's tokenizer lacks.

    Parameters
    ----------
    folder : str or os.PathLike
        As for :func:`load_llava_flexattn`.
    vision_config : transformers.CLIPVisionConfig, mapping, str or os.PathLike, optional
        As for :func:`load_llava_flexattn`.
    tokenizer : str or os.PathLike or transformers.PreTrainedTokenizerBase, optional
        The tokenizer of the language model, or where it is. By default the checkpoint's own.
    **hub
        As for :func:`load_llava_flexattn`.

    Returns
    -------
    transformers.LlavaProcessor
        To be wrapped in a :class:`FlexProcessor`. Pads at the left, with the token for what is unknown, as the
        published code does.

    Raises
    ------
    CheckpointError
        If the checkpoint is of another kind, or its tokenizer cannot be loaded or has another vocabulary.
    """
    settings = read_settings(fetched(folder, ("config.json",), **hub))
    vision = vision_settings(settings.vision_tower if vision_config is None else vision_config)
    words = _tokenizer(folder if tokenizer is None else tokenizer, **hub)
    words.add_tokens([_IMAGE], special_tokens=True)
    if words.convert_tokens_to_ids(_IMAGE) != settings.image_token_id:
        raise CheckpointError(
            f"the tokenizer has {len(words) - 1} tokens, and {folder} was trained with {settings.image_token_id}; pass "
            "tokenizer=, that of the language model."
        )
    # Of the base models some have a token for padding that is none of theirs.
    words.pad_token, words.padding_side, words.image_token = words.unk_token, "left", _IMAGE
    side = {"height": vision.image_size, "width": vision.image_size}
    return LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": vision.image_size}, crop_size=side, do_pad=True),
        words,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )


def _tokenizer(source: Any, **hub: Any) -> Any:
    if isinstance(source, PreTrainedTokenizerBase):
        return source
    try:
        return AutoTokenizer.from_pretrained(source, **hub)
    except Exception as error:  # each library behind transformers has errors of its own
        raise CheckpointError(
            f"the tokenizer of {source} cannot be loaded: {first_line(error)}; pass tokenizer=, that of the language "
            "model, or its name, for example 'llava-hf/llava-1.5-7b-hf'."
        ) from error
