"""A LLaVA of stock classes on any language model: the tower of the small model, and a projector in between."""

import copy
from typing import Any

import torch
from transformers import AddedToken, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from flexkit.visual_search.model import CELLS, IMAGE_TOKEN, LOW_RES, build_processor
from flexkit.visual_search.stages import WEIGHTS, load_whole

__all__ = ["build_base", "build_base_processor"]

_CHAT_TEMPLATE = """
{%- for message in messages -%}
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\nAnswer:' }}{% endif %}"""


def build_base_processor(tokenizer: Any) -> LlavaProcessor:
    """Build the processor: pictures as the small model sees them, and the language model's own words.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Of the language model; stays as it is.

    Returns
    -------
    transformers.LlavaProcessor
        Its chat template asks for an answer in a word: the first token of a sequence, if the language model knows
        one, the image, the question, ``Answer:``.
    """
    tokenizer = copy.deepcopy(tokenizer)
    first = tokenizer.bos_token
    if first is None or tokenizer.bos_token_id in tokenizer("a").input_ids:
        first = ""  # or the tokenizer puts it there itself
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False))
    tokenizer.image_token, tokenizer.padding_side = IMAGE_TOKEN, "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return LlavaProcessor(
        build_processor().image_processor,
        tokenizer,
        patch_size=LOW_RES // CELLS,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=first + _CHAT_TEMPLATE,
    )


def build_base(language_model: Any, processor: LlavaProcessor, seed: int = 0) -> LlavaForConditionalGeneration:
    """Build the model: the tower that ships, a projector of which nothing is trained, and the language model.

    Parameters
    ----------
    language_model : transformers.PreTrainedModel
        Causal; becomes part of the model, with one more word for the image.
    processor : transformers.LlavaProcessor
        Of :func:`build_base_processor`.
    seed : int
        Of the projector. The global random state stays as it is.

    Returns
    -------
    transformers.LlavaForConditionalGeneration
        In eval mode.
    """
    image_token = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    known = len(language_model.get_input_embeddings().weight)
    if image_token >= known:
        language_model.resize_token_embeddings(image_token + 1, mean_resizing=False)
        for words in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
            words.weight.data[known:] = words.weight.data[:known].mean(0)  # drawn by chance, it would differ each time
    tower = load_whole(WEIGHTS / "base")[0].model.vision_tower
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_id=image_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model = tower, language_model.base_model
    model.lm_head, model.generation_config = language_model.get_output_embeddings(), language_model.generation_config
    return model.eval()
