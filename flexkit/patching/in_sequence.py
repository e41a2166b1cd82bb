"""A call of a model whose image tokens stand in the decoder's own sequence."""

from functools import partial
from typing import Any

from torch import nn

from flexkit.errors import HighResInputError
from flexkit.patching.call import FlexCall
from flexkit.patching.images import read_images
from flexkit.patching.memory import cached_length, cached_memory
from flexkit.patching.queries import query_rows
from flexkit.patching.state import Patch

__all__ = ["prepare"]


def prepare(model: nn.Module, patch: Patch, high_res: dict[str, Any], kwargs: dict[str, Any]) -> FlexCall | None:
    """The call that these inputs describe; None if they ask for the base model."""
    cache = kwargs.get("past_key_values")
    past = cached_length(cache)
    memory = cached_memory(cache)
    if memory is not None and isinstance(past, int):
        memory = memory.within(past)
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None or (memory is None and not high_res):
        return None
    batch, length = tokens.shape[:2]
    repeats = high_res.pop("hd_repeats", 1)
    queries = high_res.pop("hd_queries", None)
    prompt = high_res.pop("hd_image_tokens", None)
    if high_res and prompt is not None:
        memory = memory or read_images(model, patch, high_res, prompt, kwargs, past=0, repeats=repeats)
        if queries is not None and isinstance(past, int):
            queries = queries[:, : past + length]  # the rest is named for later chunks
    elif high_res:
        image_tokens = patch.geometry.image_tokens(model, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        # Generate hands the same views in at every step; once read they are in the memory. It may also decode a token
        # that happens to be the image token: an image comes with its low-res view, or with features made of it.
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        is_new = encoded is not None or any(kwargs.get(name) is not None for name in patch.geometry.pixels)
        if memory is None or (is_new and bool(image_tokens.any())):
            new = read_images(model, patch, high_res, image_tokens, kwargs, past=int(past), repeats=repeats)
            memory = new if memory is None else memory.joined(new)
    if memory is None:
        raise HighResInputError("hd_queries were given without a high-res view.")
    if memory.batch != batch:
        raise HighResInputError(
            f"the KV cache holds high-res tokens of {memory.batch} rows, the inputs have {batch}; change the batch of "
            "a cache with its own methods (batch_repeat_interleave, batch_select_indices)."
        )
    rows = query_rows(patch.config, kwargs, memory, queries, past=past, length=length, repeats=repeats)
    encode = partial(patch.geometry.encode_tiles, model)
    return FlexCall.of(patch, memory, rows, past, cache=cache, training=model.training, encode=encode)
