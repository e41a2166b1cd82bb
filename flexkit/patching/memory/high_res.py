"""The high-res tokens of a batch: what a generation reads from, kept with its KV cache."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, StaticCache

from flexkit.attention.layer import HighResKeys
from flexkit.attention.ragged import RaggedIndex
from flexkit.attention.visible import ImageGroup
from flexkit.errors import HighResInputError
from flexkit.grids import Grid
from flexkit.patching.memory.tokens import Encoded, Features, ImageSpan

__all__ = [
    "Answer",
    "HighResMemory",
    "MemoryLayer",
    "Resident",
    "attach_memory",
    "cached_length",
    "cached_memory",
    "carrying",
    "layers_of",
]


@dataclass(frozen=True)
class Answer:
    """What an answer reads for which one selection was made."""

    tokens: Tensor
    """``(batch, tokens)``, bool."""
    start: Tensor
    """``(batch,)``, int64: the position that selected."""
    end: Tensor
    """``(batch,)``, int64: behind the last position that read."""

    def where(self, condition: Tensor, other: "Answer") -> "Answer":
        """This one in some batch rows ``(batch,)``, another in the others."""
        start, end = (torch.where(condition, *both) for both in ((self.start, other.start), (self.end, other.end)))
        return Answer(torch.where(condition[:, None], self.tokens, other.tokens), start, end)

    def of_rows(self, rows: Tensor) -> "Answer":
        """That of other batch rows."""
        return Answer(self.tokens[rows], self.start[rows], self.end[rows])

    def within(self, length: int) -> "Answer":
        """Of a sequence that was cropped; an answer that has not begun there has no position to follow."""
        return Answer(self.tokens, self.start, torch.where(self.start < length, self.end.clamp_max(length), -1))


@dataclass(frozen=True)
class Resident:
    """Tokens whose keys and values stand in the KV cache, for as long as an answer reads them."""

    tokens: RaggedIndex | None = None
    """Which they are, of all high-res tokens of a batch row; None if there are none."""
    is_padded: bool = False
    """Whether some batch rows have fewer than others."""
    goes_on: bool = True
    """Whether the answers of all batch rows have read up to the end, so that the next position goes on with them."""
    room: int | None = None
    """How many positions there may be before one slides out of a layer's window; None without windows."""

    def of_rows(self, rows: Tensor) -> "Resident":
        """Those of other batch rows."""
        return replace(self, tokens=self.tokens and self.tokens.of_rows(rows))


@dataclass
class HighResMemory:
    """High-res tokens of every batch row, padded to one length, and what has been computed from them."""

    features: Features
    tokens: int
    """How many high-res tokens the longest row has; the others are padded."""
    images: tuple[ImageSpan, ...]
    items: Tensor
    """``(batch,)``, int64: which sample a row continues; beams of one sample share it."""
    projected: dict[int, HighResKeys] = field(default_factory=dict)
    """K' and V' of each layer that are kept."""
    seen: int = 0
    """Number of positions that the text model has run."""
    in_sequence: bool = True
    """Whether columns are positions of the decoder's sequence, or keys of a context beside it."""
    front: int = 0
    """Positions in front of the prompt that a generation was given."""
    answer: Answer | None = None
    """What is read all along an answer, where one selection is made for it."""
    resident: Resident | None = None
    """Tokens that stand in the cache itself, if these are what the answer reads."""
    is_settled: bool = False
    """Whether the last call found K' and V' of all that it read: the next one is likely to, too."""
    _levels: tuple[tuple[ImageGroup, ...], ...] | None = field(default=None, init=False, repr=False)

    @classmethod
    def pack(
        cls, features: Sequence[Tensor], spans: Sequence[ImageSpan], batch: int, *, in_sequence: bool = True
    ) -> Self:
        """Lay out the features of images, each ``(tokens, dim)``, by the batch rows of their spans."""
        rows: list[list[Tensor]] = [[features[0].new_zeros(0, features[0].shape[-1])] for _ in range(batch)]
        for image, span in zip(features, spans, strict=True):
            rows[span.row].append(image)
        packed = torch.nn.utils.rnn.pad_sequence([torch.cat(parts) for parts in rows], batch_first=True)
        return cls.laid_out(Encoded(packed.detach()), spans, batch, in_sequence=in_sequence)

    @classmethod
    def laid_out(cls, features: Features, spans: Sequence[ImageSpan], batch: int, *, in_sequence: bool = True) -> Self:
        """The memory of images that stand one behind the other in their batch rows."""
        ends, images = [0] * batch, []
        for index, span in enumerate(spans):
            images.append(replace(span, start=ends[span.row], image=index))
            ends[span.row] += span.tokens
        return cls(features, max(ends), tuple(images), torch.arange(batch), in_sequence=in_sequence)

    @property
    def batch(self) -> int:
        """Number of batch rows."""
        return self.items.shape[0]  # asked in every layer, where len() of a tensor is slow

    @property
    def device(self) -> torch.device:
        """Where the high-res tokens are."""
        return self.features.device

    @property
    def all_tokens(self) -> RaggedIndex:
        """All tokens of every batch row."""
        return RaggedIndex.all(torch.ones(self.batch, self.tokens, dtype=torch.bool, device=self.device))

    @property
    def ends(self) -> Tensor:
        """``(batch, tokens)``, int64: position behind the image of each token; out of reach where rows are padded."""
        ends = np.full((self.batch, self.tokens), np.iinfo(np.int64).max)
        for span in self.images:
            ends[span.row, span.start : span.start + span.tokens] = span.end
        return torch.from_numpy(ends).to(self.device)

    @property
    def levels(self) -> tuple[tuple[ImageGroup, ...], ...]:
        """On each level of a pyramid of zooms the images by grid: the same groups, in the same order."""
        if self._levels is not None:
            return self._levels
        levels: dict[int, dict[Grid, list[ImageSpan]]] = {}
        for span in self.images:
            levels.setdefault(span.level, {}).setdefault(span.grid, []).append(span)
        grouped = []
        for level, by_grid in levels.items():
            groups = []
            for grid, spans in by_grid.items():
                first, rows = spans[0], [span.row for span in spans]
                columns = torch.stack([span.columns for span in spans])
                padded = next((span.margins for span in spans if span.margins is not None), None)
                margins = None
                if padded is not None:
                    own = [torch.zeros_like(padded) if span.margins is None else span.margins for span in spans]
                    margins = torch.stack(own)
                groups.append(
                    ImageGroup(
                        grid,
                        first.zoom,
                        torch.tensor(rows, device=columns.device),
                        columns,
                        torch.tensor([span.start for span in spans], device=columns.device),
                        margins,
                        level,
                        is_batch=rows == list(range(self.batch)),
                        begin=first.begin if all(span.begin == first.begin for span in spans) else None,
                        end=max(span.end for span in spans),
                    )
                )
            grouped.append(tuple(groups))
        self._levels = tuple(grouped) or ((),)
        return self._levels

    @property
    def bytes(self) -> int:
        """What the high-res tokens and all that is kept of them take up."""
        return self.features.bytes + sum(held.bytes for held in self.projected.values())

    @property
    def last_answer(self) -> Answer | None:
        """What was read last; while an answer goes on with resident tokens, nobody else counts on."""
        if self.answer is None or self.resident is None or not self.resident.goes_on:
            return self.answer
        return replace(self.answer, end=torch.full_like(self.answer.end, self.seen))

    @property
    def rows_with_images(self) -> Tensor:
        """``(batch,)``, bool."""
        mask = torch.zeros(self.batch, dtype=torch.bool)
        mask[[span.row for span in self.images]] = True
        return mask.to(self.features.device)

    @property
    def is_placed(self) -> bool:
        """Whether all images are in the sequence: a prompt may be run in chunks."""
        return not self.in_sequence or all(span.end <= self.seen for span in self.images)

    def place(self, position_ids: Tensor, past: int | Tensor) -> None:
        """Note the rotary positions ``(axes, batch, length)`` of images that enter the sequence behind ``past``."""
        if not self.in_sequence:
            return
        if not isinstance(past, int):
            if self.is_placed:
                return
            past = int(past)
        length = position_ids.shape[-1]
        images = []
        for span in self.images:
            if span.end > past:
                index = span.columns - past
                positions = position_ids[:, span.row, index.clamp(0, length - 1)]
                if span.positions is not None:
                    positions = torch.where((index >= 0) & (index < length), positions, span.positions)
                if span.end <= past + length and len(positions) == 3:
                    _check_grid(span, positions)
                span = replace(span, positions=positions)
            images.append(span)
        self.images = tuple(images)
        self.seen = past + length

    def joined(self, later: "HighResMemory") -> "HighResMemory":
        """This memory followed by that of later images in the same rows."""
        if type(self.features) is not type(later.features):  # pictures as a whole, and frames of videos
            return self._in_tiles().joined(later._in_tiles())
        known = len(self.features.images)
        shifted = tuple(
            replace(span, start=span.start + self.tokens, image=span.image + known) for span in later.images
        )
        return replace(
            self,
            features=self.features.joined(later.features),
            tokens=self.tokens + later.tokens,
            images=self.images + shifted,
            projected={},
            answer=None,
        )

    def _in_tiles(self) -> "HighResMemory":
        if self.features.images:
            return self
        images = tuple(replace(span, image=index) for index, span in enumerate(self.images))
        return replace(self, features=self.features.tiled(images), images=images)

    def select(self, index: Tensor) -> "HighResMemory":
        """The memory of a batch made of the rows ``index``; itself if these continue the same samples."""
        index = torch.arange(self.batch)[index.cpu()]  # a bool mask or negative indices, as tensors take them
        items = self.items[index]
        if torch.equal(items, self.items):
            return self
        sources = index.tolist()
        images = tuple(
            replace(span, row=row) for row, source in enumerate(sources) for span in self.images if span.row == source
        )
        return replace(
            self,
            features=self.features.rows(index),
            images=images,
            items=items,
            projected={layer: held.of_rows(index) for layer, held in self.projected.items()},
            answer=self.answer and self.answer.of_rows(index),
            resident=self.resident and self.resident.of_rows(index),
        )

    def repeat_interleave(self, repeats: int) -> "HighResMemory":
        """The memory of a batch with every row ``repeats`` times in succession."""
        return self if repeats == 1 else self.select(torch.arange(self.batch).repeat_interleave(repeats))

    def within(self, length: int) -> "HighResMemory | None":
        """The memory without images that a cache cropped to ``length`` no longer holds; None if none is left."""
        if length >= self.seen or not self.in_sequence:
            return self
        images = tuple(span for span in self.images if span.end <= length)
        answer, resident = self.last_answer, self.resident
        if resident is not None and answer is not None:
            begun = bool((answer.start < length)[self.rows_with_images].all())
            resident = replace(resident, goes_on=resident.goes_on and begun)
        answer = answer and answer.within(length)
        return replace(self, images=images, seen=length, answer=answer, resident=resident) if images else None


def _check_grid(span: ImageSpan, positions: Tensor) -> None:
    """Raise :class:`~flexkit.errors.HighResInputError` if (time, row, column) of all cells lay out another grid."""
    if torch.equal(positions[1], positions[2]):  # the cells are numbered, three times
        return
    first = positions[1:, : math.prod(span.grid[-2:])]  # frame
    laid_out = tuple(len(axis.unique()) for axis in first)
    if laid_out != span.grid[-2:]:
        raise HighResInputError(
            f"the rotary positions of an image lay out a grid of {laid_out}, its high-res view is a zoom of "
            f"{span.grid[-2:]}; pass the high-res views in the order of the images."
        )


class MemoryLayer:
    """What makes a layer of a KV cache carry the memory: all that is done to its keys and values is done to both.

    A layer becomes one by its class, so that a cache keeps the layers that its model gave it, and copies and pickles
    of it carry the memory too.
    """

    own: ClassVar[Any]
    """The class that the layer had."""
    kind: ClassVar[type]
    """This class, or one derived from it."""
    hd_memory: HighResMemory | None
    hd_length: int
    """How many positions methods of a growing layer have put in and left there."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (self.own, self.kind), vars(self)

    def update(self, key_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take keys and values in."""
        if isinstance(self, DynamicLayer):
            self.hd_length += key_states.shape[-2]
        return self.own.update(self, key_states, *args, **kwargs)

    def reset(self) -> None:
        """Forget the images, too."""
        self.own.reset(self)
        self.hd_memory = None
        if isinstance(self, DynamicLayer):
            self.hd_length = self.own.get_seq_length(self)  # early versions of transformers keep zeros

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Forget images that are no longer there as a whole, too."""
        before = self.own.get_seq_length(self)
        self.own.crop(self, *args, **kwargs)
        length = self.own.get_seq_length(self)
        self.hd_length -= before - length
        if self.hd_memory is not None:
            self.hd_memory = self.hd_memory.within(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.own.reorder_cache(self, beam_idx)
        if self.hd_memory is not None:
            self.hd_memory = self.hd_memory.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows."""
        self.own.batch_select_indices(self, indices)
        if self.hd_memory is not None:
            self.hd_memory = self.hd_memory.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        self.own.batch_repeat_interleave(self, repeats)
        if self.hd_memory is not None:
            self.hd_memory = self.hd_memory.repeat_interleave(repeats)


@cache
def carrying(own: type, kind: type) -> type:
    """The class of layers of one class that are a :class:`MemoryLayer`, of this kind."""
    # The layer's own class stands first, whose layout it must have, so that the methods are set on the class itself.
    # transformers would have classes with a type of layer make all layers of that type.
    known = {
        "own": own,
        "kind": kind,
        "_layer_type": None,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
    }
    methods = {name: method for name, method in inspect.getmembers(kind, inspect.isfunction)}
    return type(own)(own.__name__, (own, kind), known | methods)


def _blank(own: type, kind: type) -> Any:
    of_both: Any = carrying(own, kind)
    return of_both.__new__(of_both)


def _carrier(cache: object) -> Any:
    """The layer that carries the memory: the first that holds the whole sequence, if any does."""
    if not isinstance(cache, Cache):
        return None
    own = getattr(cache, "self_attention_cache", cache)  # the decoder's, where an encoder's stand beside
    of_windows = None
    for layer in own.layers:  # the first, in most models
        if isinstance(layer, CacheLayerMixin):
            if not getattr(layer, "is_sliding", False):
                return layer
            of_windows = of_windows or layer
    return of_windows


def cached_memory(cache: object) -> HighResMemory | None:
    """The high-res memory that a KV cache carries, if any."""
    layer = _carrier(cache)
    return layer.hd_memory if isinstance(layer, MemoryLayer) else None


def cached_length(cache: Any) -> int | Tensor:
    """Positions that a cache holds: a number, but a tensor while compiling a static cache, whose graphs serve all.

    Raises
    ------
    HighResInputError
        If positions came or went by other ways than the methods of a cache that carries a memory.
    """
    length = cache.get_seq_length() if cache is not None else 0
    if isinstance(length, Tensor) and torch.compiler.is_compiling():
        return length.clone()  # the cache counts on in place
    layer = _carrier(cache)
    grows = isinstance(layer, MemoryLayer) and isinstance(layer, DynamicLayer)
    if grows and layer.hd_memory is not None and layer.hd_memory.in_sequence:
        held = layer.get_seq_length()
        if held != layer.hd_length:
            raise HighResInputError(
                f"the KV cache was given {layer.hd_length} positions and holds {held}: its images may no longer stand "
                "where they were. Change its length with its own method crop, or run the prompt again."
            )
    return int(length)


def layers_of(cache: object, kinds: Sequence[type]) -> list[Any] | None:
    """The layers of a cache that is all in one place, if they are of some kinds and filled; None of any other cache."""
    if not isinstance(cache, DynamicCache | StaticCache) or getattr(cache, "offloading", False):
        return None
    layers: list[Any] = cache.layers
    of_kinds = all(getattr(type(layer), "own", type(layer)) in kinds for layer in layers)
    return layers if of_kinds and all(layer.keys is not None for layer in layers) else None


def attach_memory(cache: object, memory: HighResMemory) -> None:
    """Let a KV cache carry ``memory``, in place of what it carried."""
    layer = _carrier(cache)
    if layer is None:
        return
    if not isinstance(layer, MemoryLayer):
        own: type = type(layer)
        layer.__class__ = carrying(own, MemoryLayer)
        layer.hd_length = memory.seen
    layer.hd_memory = memory
