"""High-res tokens in the KV cache itself, beside all positions, for as long as an answer reads them.

Where base kernels read one selection all along an answer, a decoded token then costs what the base model's does:
nothing is joined, and nothing about the tokens is asked again. Nobody else sees them: the layers of the cache give and
count the positions alone. What the tokens stand for, if they take its place, the answer does not see: in a cache that
grows it stands in front of them, and is back where it was for everybody else; in a static one it is masked.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from flexkit.attention.layer import HighResKeys
from flexkit.attention.ragged import RaggedIndex
from flexkit.attention.visible import behind_tokens, without_keys
from flexkit.patching.memory.high_res import (
    HighResMemory,
    MemoryLayer,
    Resident,
    attach_memory,
    carrying,
    layers_of,
)

__all__ = ["GrowingResident", "ResidentLayer", "move_in", "move_out"]


@dataclass(frozen=True)
class Places:
    """The positions that a cache holds, apart: those that an answer sees, and those that tokens stand for."""

    seen: RaggedIndex
    hidden: RaggedIndex

    @classmethod
    def of(cls, hidden: Tensor) -> Self:
        """By a mask ``(batch, positions)``."""
        return cls(RaggedIndex(~hidden), RaggedIndex(hidden))

    @property
    def missing(self) -> int:
        """How many more positions there are than entries of both."""
        return self.seen.mask.shape[1] - self.seen.count - self.hidden.count

    def of_rows(self, rows: Tensor) -> "Places":
        """Those of other batch rows."""
        return Places(self.seen.of_rows(rows), self.hidden.of_rows(rows))

    def within(self, length: int) -> "Places":
        """Those in front of a position."""
        return self if length >= self.seen.mask.shape[1] else Places.of(self.hidden.mask[:, :length])

    def around(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Keys or values ``(batch, heads, positions, dim)``: hidden positions, those of tokens, and the others."""
        known, later = states[:, :, : self.seen.mask.shape[1]], states[:, :, self.seen.mask.shape[1] :]
        return torch.cat([self.hidden.gather(known, 2), tokens, self.seen.gather(known, 2), later], dim=2)

    def in_order(self, hidden: Tensor, rest: Tensor) -> Tensor:
        """Keys or values of hidden positions and of the others, in the order of their positions again."""
        seen, later = rest[:, :, : self.seen.count], rest[:, :, self.seen.count :]
        blank = seen.new_zeros(len(seen), self.seen.mask.shape[1], *seen.shape[1::2])
        known = self.hidden.scatter(hidden.transpose(1, 2), self.seen.scatter(seen.transpose(1, 2), blank))
        return torch.cat([known.transpose(1, 2), later], dim=2)

    def mask(self, base: Tensor | None, keys: int) -> Tensor | None:
        """A kernel's mask ``(batch or 1, heads or 1, queries, positions)`` for the keys that an answer sees."""
        count, length = self.seen.count, self.seen.mask.shape[1]
        if base is None:
            return None if self.seen.full else pad(self.seen.valid[:, None, None], (0, keys - count), value=True)
        known = self.seen.gather(base[..., :length], -1)
        if not self.seen.full:
            known = without_keys(known, ~self.seen.valid[:, None, None])
        return torch.cat([known, base[..., length:].expand(len(known), -1, -1, -1)], dim=-1)


class ResidentLayer(MemoryLayer):
    """What makes a layer of a cache hold high-res tokens, which it neither gives nor counts."""

    keys: Any
    values: Any
    hd_count: int = 0
    """How many high-res tokens it holds."""

    @property
    def hd_seen(self) -> tuple[Tensor, Tensor]:
        """Keys and values that the answer sees."""
        raise NotImplementedError

    def hd_mask(self, base: Tensor | None, resident: Resident) -> Tensor | None:
        """A kernel's mask for these, from that of the base model for the positions."""
        raise NotImplementedError

    def hides(self, hidden: Tensor | None, valid: Tensor) -> Any:
        """What :meth:`put` takes of what the answer does not see.

        Parameters
        ----------
        hidden : torch.Tensor, optional
            ``(batch, positions)``, bool: the positions that tokens stand for.
        valid : torch.Tensor
            ``(batch, tokens)``, bool: which of the tokens mean something.
        """
        raise NotImplementedError

    def put(self, key: Tensor, value: Tensor, hides: Any) -> None:
        """Take keys and values of tokens in, where there are none."""
        raise NotImplementedError

    def take(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens, which it no longer holds; nothing is hidden."""
        raise NotImplementedError


class GrowingResident(ResidentLayer):
    """A layer of a growing cache: it holds hidden positions, tokens, and all other positions, in this order.

    Answers go on in it while nothing slides out of its window, if it has one.
    """

    is_sliding: bool
    cumulative_length: int
    hd_places: Places | None = None
    """Where the positions belong, if some are hidden."""
    hd_follows: bool = False
    """Whether what is put in next goes on with the answer."""

    @property
    def hd_hidden(self) -> int:
        """How many hidden positions stand in front of the tokens."""
        return 0 if self.hd_places is None else self.hd_places.hidden.count

    @property
    def hd_seen(self) -> tuple[Tensor, Tensor]:
        return self.keys[:, :, self.hd_hidden :], self.values[:, :, self.hd_hidden :]

    def hd_mask(self, base: Tensor | None, resident: Resident) -> Tensor | None:
        keys = self.keys.shape[2] - self.hd_hidden - self.hd_count
        mask = base if self.hd_places is None else self.hd_places.mask(base, keys)
        if resident.tokens is None or (mask is None and not resident.is_padded):
            return mask
        return behind_tokens(resident.tokens.valid[:, None, None].to(self.keys.device), mask, keys)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take keys and values in."""
        if not self.hd_follows and (self.is_sliding or self.hd_places is not None):
            tokens = self.take()  # positions are in order then, and a window holds nothing else
            found = MemoryLayer.update(self, key_states, value_states, *args, **kwargs)
            self.put(*tokens, None)
            return found
        if self.is_sliding:  # nothing slides out, and the tokens do not count
            self.cumulative_length += key_states.shape[2]
            self.hd_length += key_states.shape[2]
            found = DynamicLayer.update(self, key_states, value_states)
        else:
            found = MemoryLayer.update(self, key_states, value_states, *args, **kwargs)
        return tuple(states[:, :, self.hd_hidden + self.hd_count :] for states in found)

    def get_seq_length(self) -> int:
        """How many positions it holds."""
        if self.is_sliding:
            return self.cumulative_length
        missing = 0 if self.hd_places is None else self.hd_places.missing
        return int(self.own.get_seq_length(self)) - self.hd_count + missing

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Forget positions alone."""
        places = self.hd_places
        tokens = self.take()
        try:
            MemoryLayer.crop(self, *args, **kwargs)
        finally:
            self.put(*tokens, places and places.within(self.keys.shape[2]))

    def reset(self) -> None:
        """Forget the tokens, too: it holds what a layer of its cache does."""
        self.hd_count, self.hd_places = 0, None
        MemoryLayer.reset(self)
        self.__class__ = carrying(self.own, MemoryLayer)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        MemoryLayer.reorder_cache(self, beam_idx)
        self.hd_places = self.hd_places and self.hd_places.of_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows."""
        MemoryLayer.batch_select_indices(self, indices)
        self.hd_places = self.hd_places and self.hd_places.of_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        rows = torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats)
        MemoryLayer.batch_repeat_interleave(self, repeats)
        self.hd_places = self.hd_places and self.hd_places.of_rows(rows)

    def hides(self, hidden: Tensor | None, valid: Tensor) -> Places | None:
        return None if hidden is None else Places.of(hidden.to(self.keys.device))

    def put(self, key: Tensor, value: Tensor, hides: Places | None) -> None:
        self.hd_count = key.shape[2]
        if not self.hd_count:
            return
        if hides is None:
            self.keys, self.values = torch.cat([key, self.keys], dim=2), torch.cat([value, self.values], dim=2)
        else:
            self.keys, self.values = hides.around(self.keys, key), hides.around(self.values, value)
            self.hd_places = hides

    def take(self) -> tuple[Tensor, Tensor]:
        hidden, count, places = self.hd_hidden, self.hd_hidden + self.hd_count, self.hd_places
        key, value, self.hd_count, self.hd_places = self.keys, self.values, 0, None
        self.keys, self.values = key[:, :, count:], value[:, :, count:]
        if places is not None:
            self.keys = places.in_order(key[:, :, :hidden], self.keys)
            self.values = places.in_order(value[:, :, :hidden], self.values)
        return key[:, :, hidden:count], value[:, :, hidden:count]


class StaticResident(ResidentLayer):
    """A layer of a static cache, with room for tokens behind that for positions, of which nothing is moved."""

    max_cache_len: int
    hd_hidden: Tensor | None = None
    """``(batch, room)``, bool: the positions and tokens that the answer does not see."""

    @property
    def hd_seen(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def hd_mask(self, base: Tensor | None, resident: Resident) -> Tensor | None:
        if self.hd_hidden is None:
            return base
        tokens = self.hd_hidden.shape[1] - self.max_cache_len
        both = None if base is None else pad(base, (0, tokens), value=base.dtype == torch.bool)
        return without_keys(both, self.hd_hidden[:, None, None])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take keys and values in."""
        found = MemoryLayer.update(self, key_states, value_states, *args, **kwargs)
        return tuple(states[:, :, : self.max_cache_len] for states in found)

    def reset(self) -> None:
        """Forget the tokens, too; their room stays."""
        self.hd_count, self.hd_hidden = 0, None
        MemoryLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        MemoryLayer.reorder_cache(self, beam_idx)
        self.hd_hidden = None if self.hd_hidden is None else self.hd_hidden[beam_idx]

    def hides(self, hidden: Tensor | None, valid: Tensor) -> Tensor:
        hidden = valid[:, :0] if hidden is None else hidden
        return torch.cat([pad(hidden, (0, self.max_cache_len - hidden.shape[1])), ~valid], dim=1).to(self.keys.device)

    def put(self, key: Tensor, value: Tensor, hides: Tensor) -> None:
        self.hd_count, self.hd_hidden = key.shape[2], hides
        for name, tokens in (("keys", key), ("values", value)):
            states = getattr(self, name)
            room = states[:, :, self.max_cache_len :]
            if room.shape == tokens.shape:
                room.copy_(tokens)  # where graphs know it
            else:
                states = torch.cat([states[:, :, : self.max_cache_len], tokens], dim=2)
                torch._dynamo.mark_static_address(states)  # as the layer's own
                setattr(self, name, states)

    def take(self) -> tuple[Tensor, Tensor]:
        self.hd_count, self.hd_hidden = 0, None
        return self.keys[:, :, self.max_cache_len :], self.values[:, :, self.max_cache_len :]


def move_in(
    cache: object, memory: HighResMemory, shapes: Mapping[int, torch.Size], hidden: Tensor | None = None
) -> HighResMemory:
    """Move what an answer reads into the cache, if every row goes on with one and the cache is of a kind that takes it.

    Parameters
    ----------
    cache : transformers.Cache or None
        What the text model has filled.
    memory : HighResMemory
        Of these batch rows.
    shapes : mapping of int to torch.Size
        The shape of the keys that each layer attends to.
    hidden : torch.Tensor, optional
        ``(batch, positions)``, bool: what the answers do not see where they read the tokens.

    Returns
    -------
    HighResMemory
        What the cache then has to carry; the given one, if nothing was moved.
    """
    answer = memory.answer
    layers: list[Any] = getattr(cache, "layers", [])
    kind = _kind(cache, shapes)
    if answer is None or not memory.in_sequence or kind is None:
        return memory
    windows = [layer.sliding_window for layer in layers if layer.is_sliding] if kind is GrowingResident else []
    room = min(windows) - 1 if windows else None
    if room is not None and memory.seen > room:
        return memory
    with_images = memory.rows_with_images
    if not bool((answer.end == memory.seen)[with_images].all()):
        return memory
    given = answer.tokens & with_images[:, None]
    first = next(iter(memory.projected.values()), None)
    places = RaggedIndex(given[:, :0] if first is None else first.tokens.among(given))
    resident, left = Resident(room=room), memory.projected
    if first is not None and places.count:
        rest, left = RaggedIndex(first.tokens.valid & ~places.mask), {}
        hides = dict[torch.device, Any]()
        for index in list(memory.projected):
            keys = memory.projected.pop(index)  # and not there twice
            moved = keys.at(places, given)
            layer = _resident(layers[index], kind, memory.seen)
            if layer.keys.device not in hides:
                hides[layer.keys.device] = layer.hides(hidden, places.valid)
            layer.put(moved.key, moved.value, hides[layer.keys.device])
            if rest.count:
                left[index] = keys.at(rest, keys.tokens.mask & ~given)
        resident = replace(resident, tokens=moved.tokens, is_padded=not bool(places.valid.all()))
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
        if isinstance(layer, ResidentLayer) and layer.hd_count and resident.tokens is not None:
            key, value = layer.take()
            moved = HighResKeys(key.clone(), value.clone(), resident.tokens)
            projected[index] = projected[index].and_then(moved) if index in projected else moved
    memory = replace(memory, projected=projected, resident=None, answer=memory.last_answer)
    attach_memory(cache, memory)
    return memory


def _resident(layer: Any, kind: type, length: int) -> ResidentLayer:
    """A layer that holds so many positions, as one that may hold high-res tokens, too."""
    if not isinstance(layer, ResidentLayer):
        own: type = type(layer).own if isinstance(layer, MemoryLayer) else type(layer)
        layer.__class__ = carrying(own, kind)
        vars(layer).update({"hd_memory": None, "hd_length": length} | vars(layer))
    resident: ResidentLayer = layer
    return resident


def _kind(cache: object, shapes: Mapping[int, torch.Size]) -> type[ResidentLayer] | None:
    """What layers become that hold the keys that their attention sees, in one tensor that grows, or has room."""
    growing = layers_of(cache, (DynamicLayer, DynamicSlidingWindowLayer))
    static = layers_of(cache, (StaticLayer, StaticSlidingWindowLayer))
    if static and (len({layer.max_cache_len for layer in static}) > 1 or all(layer.is_sliding for layer in static)):
        static = None  # a window that is shorter than the cache lets go of positions, in place
    for kind, layers in ((GrowingResident, growing), (StaticResident, static)):
        if layers is not None and len(layers) == len(shapes):
            held = (layer.keys[:, :, : getattr(layer, "max_cache_len", None)] for layer in layers)
            if all(states.shape == shapes.get(index) for index, states in enumerate(held)):
                return kind
    return None
