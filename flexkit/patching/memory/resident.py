"""High-res tokens in the KV cache itself, in front of all positions, for as long as an answer reads them.

Where base kernels read one selection all along an answer, a decoded token then costs what the base model's does:
nothing is joined, and nothing about the tokens is asked again. Nobody else sees them: the layers of the cache give and
count the positions alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flexkit.attention.layer import HighResKeys
from flexkit.attention.ragged import RaggedIndex
from flexkit.patching.memory.high_res import (
    HighResMemory,
    MemoryLayer,
    Resident,
    attach_memory,
    carrying,
    growing_layers,
)

__all__ = ["ResidentLayer", "move_in", "move_out"]


class ResidentLayer(MemoryLayer):
    """What makes a layer of a growing cache hold high-res tokens, which it neither gives nor counts."""

    keys: Any
    values: Any
    hd_front: int = 0
    """How many high-res tokens stand in front of the positions."""

    def update(self, key_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take keys and values in."""
        found = MemoryLayer.update(self, key_states, *args, **kwargs)
        return tuple(states[:, :, self.hd_front :] for states in found)

    def get_seq_length(self) -> int:
        """How many positions it holds."""
        return int(self.own.get_seq_length(self)) - self.hd_front

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Forget positions alone."""
        tokens = self.take_front()
        MemoryLayer.crop(self, *args, **kwargs)
        self.put_front(*tokens)

    def reset(self) -> None:
        """Forget the tokens, too."""
        self.hd_front = 0
        MemoryLayer.reset(self)

    def take_front(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens, which no longer stand in front of the positions."""
        count, key, value = self.hd_front, self.keys, self.values
        self.keys, self.values, self.hd_front = key[:, :, count:], value[:, :, count:], 0
        return key[:, :, :count], value[:, :, :count]

    def put_front(self, key: Tensor, value: Tensor) -> None:
        """Put keys and values of tokens in front of the positions, where there are none."""
        self.hd_front = key.shape[2]
        if self.hd_front:
            self.keys, self.values = torch.cat([key, self.keys], dim=2), torch.cat([value, self.values], dim=2)


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
    resident, left = Resident(), memory.projected
    if first is not None and places.count:
        rest, left = RaggedIndex(first.tokens.valid & ~places.mask), {}
        for index, keys in memory.projected.items():
            moved = keys.at(places, given)
            _resident(layers[index], memory.seen).put_front(moved.key, moved.value)
            if rest.count:
                left[index] = keys.at(rest, keys.tokens.mask & ~given)
        resident = Resident(moved.tokens, is_padded=not bool(places.valid.all()))
    return replace(memory, projected=left, resident=resident)


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
        if isinstance(layer, ResidentLayer) and layer.hd_front and resident.tokens is not None:
            key, value = layer.take_front()
            moved = HighResKeys(key.clone(), value.clone(), resident.tokens)
            projected[index] = projected[index].and_then(moved) if index in projected else moved
    memory = replace(memory, projected=projected, resident=None, answer=memory.last_answer)
    attach_memory(cache, memory)
    return memory


def _resident(layer: Any, length: int) -> ResidentLayer:
    """A layer that holds so many positions, as one that may hold high-res tokens, too."""
    if not isinstance(layer, ResidentLayer):
        own: type = type(layer).own if isinstance(layer, MemoryLayer) else type(layer)
        layer.__class__ = carrying(own, ResidentLayer)
        vars(layer).update({"hd_memory": None, "hd_length": length} | vars(layer))
    resident: ResidentLayer = layer
    return resident


def _grows(cache: object, shapes: Mapping[int, torch.Size]) -> bool:
    """Whether every layer of a cache holds the keys that its layer attends to, in one tensor that grows."""
    layers = growing_layers(cache)
    if layers is None or len(layers) != len(shapes):
        return False
    return all(layer.keys.shape == shapes.get(index) for index, layer in enumerate(layers))
