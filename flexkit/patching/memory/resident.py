"""High-res tokens in the KV cache itself, in front of all positions, for as long as an answer reads them.

Where base kernels read one selection all along an answer, a decoded token then costs what the base model's does:
nothing is joined, and nothing about the tokens is asked again. Nobody else sees them: the layers of the cache give and
count the positions alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from flexkit.attention.layer import HighResKeys
from flexkit.attention.ragged import RaggedIndex
from flexkit.patching.memory.high_res import HighResMemory, MemoryLayer, Resident, attach_memory, carry

__all__ = ["move_in", "move_out"]


def move_in(cache: object, memory: HighResMemory, shapes: Mapping[int, torch.Size]) -> HighResMemory:
    """Move what an answer reads into the cache, if every row goes on with one and the cache is a growing one.

    Parameters
    ----------
    cache : transformers.Cache or None
        What the text model has filled.
    memory : HighResMemory
        Of these batch rows.
    shapes : mapping of int to torch.Size
        The shape of the keys that each layer attends to.

    Returns
    -------
    HighResMemory
        What the cache then has to carry; the given one, if nothing was moved.
    """
    answer = memory.answer
    layers: list[Any] = getattr(cache, "layers", [])
    if answer is None or not memory.in_sequence or not _grows(cache, shapes):
        return memory
    with_images = memory.rows_with_images
    if not bool((answer.end == memory.seen)[with_images].all()):
        return memory
    given = answer.tokens & with_images[:, None]
    first = next(iter(memory.projected.values()), None)
    places = RaggedIndex(given[:, :0] if first is None else first.tokens.among(given))
    resident = Resident(None, memory.seen)
    if first is not None and places.count:
        rest = RaggedIndex(first.tokens.valid & ~places.mask)
        left, is_padded = {}, not bool(places.valid.all())
        for index, keys in memory.projected.items():
            moved = keys.at(places, given)
            carry(layers[index], memory.seen).put_front(moved.key, moved.value)
            resident = Resident(moved.tokens, memory.seen, is_padded)
            if rest.count:
                left[index] = keys.at(rest, keys.tokens.mask & ~given)
        memory = replace(memory, projected=left)
    return replace(memory, resident=resident)


def move_out(cache: Any, memory: HighResMemory) -> HighResMemory:
    """Take what an answer has read out of the cache again: another one may begin, which reads something else.

    Parameters
    ----------
    cache : transformers.Cache
        That carries the memory.
    memory : HighResMemory
        With tokens that are resident in the cache.
    """
    resident, projected = memory.resident, dict(memory.projected)
    if resident is None:
        return memory
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, MemoryLayer) and layer.hd_front and resident.tokens is not None:
            key, value = layer.take_front()
            moved = HighResKeys(key.clone(), value.clone(), resident.tokens)
            projected[index] = projected[index].and_then(moved) if index in projected else moved
    memory = replace(memory, projected=projected, resident=None, answer=memory.last_answer)
    attach_memory(cache, memory)
    return memory


def _grows(cache: object, shapes: Mapping[int, torch.Size]) -> bool:
    """Whether every layer of a cache holds the keys that its layer attends to, in one tensor that grows."""
    if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False) or len(cache.layers) != len(shapes):
        return False
    layers: list[Any] = cache.layers
    return all(
        getattr(type(layer), "own", type(layer)) is DynamicLayer and layer.keys.shape == shapes.get(index)
        for index, layer in enumerate(layers)
    )
