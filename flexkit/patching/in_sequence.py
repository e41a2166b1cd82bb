"""A call of a model whose image tokens stand in the decoder's own sequence."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

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
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    tokens = embeds if ids is None else ids
    if tokens is None or (memory is None and not high_res):
        return None
    batch, length = tokens.shape[:2]
    repeats = high_res.pop("hd_repeats", 1)
    queries = high_res.pop("hd_queries", None)
    prompt = high_res.pop("hd_image_tokens", None)
    if high_res and prompt is not None:
        if memory is None:
            front = int(past) + _in_front(prompt, patch.geometry.image_tokens(model, ids, embeds), ids is not None)
            memory = read_images(model, patch, high_res, prompt, kwargs, past=front, repeats=repeats)
            memory.front = front
        if queries is not None and isinstance(past, int):
            queries = pad(queries, (memory.front, 0))[:, : past + length]  # the rest is named for later chunks
    elif high_res:
        image_tokens = patch.geometry.image_tokens(model, ids, embeds)
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


def _in_front(noted: Tensor, found: Tensor, by_ids: bool) -> int:
    """How many positions of a call stand in front of its prompt: those that no token stands for (PEFT's prompts).

    Parameters
    ----------
    noted : torch.Tensor
        ``(batch, prompt)``, bool: where the prompt that ``generate`` was given holds image tokens.
    found : torch.Tensor
        ``(batch, length)``, bool: where the call holds them; it may be a chunk of the prompt, or run on behind it.
    by_ids : bool
        Whether they were found among ids: embeddings may hold features in the place of image tokens.

    Raises
    ------
    HighResInputError
        If these are not the image tokens of one prompt.
    """
    if not by_ids and noted.shape == found.shape and not found.any():
        return 0
    both = noted.any(-1) & found.any(-1)
    starts = set((found.int().argmax(-1) - noted.int().argmax(-1))[both].tolist()) or ({0} if by_ids else set())
    front = starts.pop() if len(starts) == 1 else -1
    if front >= 0:
        expected = pad(noted, (front, 0))
        length = min(expected.shape[1], found.shape[1])
        if torch.equal(found[:, :length], expected[:, :length]):
            return int(front)
    raise HighResInputError(
        f"generate was given a prompt of {noted.shape[1]} positions with {noted.sum(-1).tolist()} image tokens in its "
        f"rows; the model is given {found.shape[1]} positions with {found.sum(-1).tolist()}, which are not that prompt "
        "behind something else. Put as many positions in front of every row, and no image tokens among them."
    )
