"""The high-res tokens of a batch: what a generation reads from, kept with its KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from flexkit.errors import HighResInputError
from flexkit.lazy import lazy
from flexkit.patching.features import Encode, Encoded, Features
from flexkit.patching.projected import Projected, Tokens
from flexkit.zoom import Pair

__all__ = ["HighResMemory", "ImageSpan", "MemoryLayer", "attach_memory", "cached_length", "cached_memory"]


@dataclass(frozen=True)
class ImageSpan:
    """Where one image stands: its low-res tokens in the sequence, its high-res tokens in the memory."""

    row: int
    """Batch row of the image."""
    columns: Tensor
    """``(cells,)``, int64: positions of the low-res tokens in the whole sequence, raster order."""
    grid: Pair
    zoom: Pair
    start: int
    """Index of the first high-res token in the memory's row."""
    image: int
    """Which image it is; rows of one sample may share one."""
    margins: Tensor | None
    """``(2,)``, int64: padded cells on each side, along rows and columns; None where there are none."""
    positions: Tensor | None = None
    """``(axes, cells)``: rotary positions of the low-res tokens, known once the text model has run them all."""
    level: int = 0
    """Which level of a pyramid of zooms; every level has a span of its own."""

    @lazy
    def end(self) -> int:
        """Position behind the last low-res token."""
        return int(self.columns.max()) + 1

    @property
    def tokens(self) -> int:
        """Number of high-res tokens."""
        return self.grid[0] * self.zoom[0] * self.grid[1] * self.zoom[1]

    def placed(self, position_ids: Tensor, past: int) -> "ImageSpan":
        """The same image with the rotary positions ``(axes, length)`` of its tokens behind the first ``past``."""
        index = self.columns - past
        length = position_ids.shape[-1]
        positions = position_ids[:, index.clamp(0, length - 1)]
        if self.positions is not None:
            positions = torch.where((index >= 0) & (index < length), positions, self.positions)
        if self.end <= past + length:
            self._check(positions)
        return replace(self, positions=positions)

    def _check(self, positions: Tensor) -> None:
        """Raise :class:`~flexkit.errors.HighResInputError` if rotary positions lay out another grid."""
        if len(positions) == 3 and not torch.equal(positions[1], positions[2]):  # (time, row, column)
            laid_out = tuple(len(axis.unique()) for axis in positions[1:])
            if laid_out != self.grid:
                raise HighResInputError(
                    f"the rotary positions of an image lay out a grid of {laid_out}, its high-res view is a zoom of "
                    f"{self.grid}; pass the high-res views in the order of the images."
                )


@dataclass
class HighResMemory:
    """High-res tokens of every batch row, padded to one length, and what has been computed from them."""

    features: Features
    tokens: int
    """How many high-res tokens the longest row has; the others are padded."""
    images: tuple[ImageSpan, ...]
    items: Tensor
    """``(batch,)``, int64: which sample a row continues; beams of one sample share it."""
    projected: dict[int, Projected] = field(default_factory=dict)
    """K' and V' of each layer that are kept."""
    seen: int = 0
    """Number of positions that the text model has run."""
    in_sequence: bool = True
    """Whether columns are positions of the decoder's sequence, or keys of a context beside it."""

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
        return len(self.items)

    @property
    def device(self) -> torch.device:
        """Where the high-res tokens are."""
        return self.features.device

    def features_of(self, tokens: Tokens | None, encode: Encode) -> Tensor:
        """``(batch, tokens, dim)``: features of some tokens, or of all; zero where rows are padded."""
        if tokens is None:
            index = torch.arange(self.tokens, device=self.device).expand(self.batch, -1)
            tokens = Tokens(index, torch.ones_like(index, dtype=torch.bool), self.tokens)
        return self.features.of(tokens, self.images, encode)

    @property
    def bytes(self) -> int:
        """What the high-res tokens and all that is kept of them take up."""
        return self.features.bytes + sum(held.bytes for held in self.projected.values())

    @property
    def rows_with_images(self) -> Tensor:
        """``(batch,)``, bool."""
        mask = torch.zeros(self.batch, dtype=torch.bool)
        mask[[span.row for span in self.images]] = True
        return mask.to(self.device)

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
        self.images = tuple(
            span.placed(position_ids[:, span.row], past) if span.end > past else span for span in self.images
        )
        self.seen = past + position_ids.shape[-1]

    def joined(self, later: "HighResMemory") -> "HighResMemory":
        """This memory followed by that of later images in the same rows."""
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
        )

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
            projected={layer: held.rows(index) for layer, held in self.projected.items()},
        )

    def repeat_interleave(self, repeats: int) -> "HighResMemory":
        """The memory of a batch with every row ``repeats`` times in succession."""
        return self if repeats == 1 else self.select(torch.arange(self.batch).repeat_interleave(repeats))

    def within(self, length: int) -> "HighResMemory | None":
        """The memory without images that a cache cropped to ``length`` no longer holds; None if none is left."""
        if length >= self.seen or not self.in_sequence:
            return self
        images = tuple(span for span in self.images if span.end <= length)
        return replace(self, images=images, seen=length) if images else None


class MemoryLayer(CacheLayerMixin):
    """An extra layer of a KV cache that carries the memory, so that cache surgery on the batch moves both."""

    is_compileable = True
    is_croppable = True
    supports_early_init = False

    def __init__(self, memory: HighResMemory, is_sliding: bool) -> None:
        super().__init__()
        self.memory: HighResMemory | None = memory
        # Masks are sized by the first layer of a kind: this one must never be the only one of its kind.
        self.is_sliding = is_sliding
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to initialise."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """No decoder layer writes here."""
        raise RuntimeError("the layer that carries high-res tokens takes no keys and values.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Size of a mask over no keys."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """No sequence is held here."""
        return 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget the images."""
        self.memory = None

    def crop(self, *args: object) -> None:
        """Which images are left is decided when the cache is used next."""

    def offload(self) -> None:
        """High-res tokens stay on their device."""

    def prefetch(self) -> None:
        """High-res tokens stay on their device."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows."""
        if self.memory is not None:
            self.memory = self.memory.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        if self.memory is not None:
            self.memory = self.memory.repeat_interleave(repeats)


def _own_layers(cache: Any) -> list[CacheLayerMixin]:
    """The layers that hold a sequence of the decoder's own, if the cache holds an encoder's beside."""
    layers: list[CacheLayerMixin] = getattr(cache, "self_attention_cache", cache).layers
    return layers


def cached_memory(cache: object) -> HighResMemory | None:
    """The high-res memory that a KV cache carries, if any."""
    if not isinstance(cache, Cache):
        return None
    carriers = [layer for layer in _own_layers(cache) if isinstance(layer, MemoryLayer)]
    return carriers[-1].memory if carriers else None


def cached_length(cache: Any) -> int | Tensor:
    """Positions that a cache holds: a number, but a tensor while compiling a static cache, whose graphs serve all."""
    length = cache.get_seq_length() if cache is not None else 0
    if isinstance(length, Tensor) and torch.compiler.is_compiling():
        return length.clone()  # the cache counts on in place
    return int(length)


def attach_memory(cache: object, memory: HighResMemory) -> None:
    """Let a KV cache carry ``memory``, in place of what it carried."""
    if not isinstance(cache, Cache):
        return
    layers = _own_layers(cache)
    carriers = [layer for layer in layers if isinstance(layer, MemoryLayer)]
    if carriers:
        carriers[-1].memory = memory
    else:
        layers.append(MemoryLayer(memory, is_sliding=getattr(layers[-1], "is_sliding", False)))
    if getattr(cache, "offloading", False):
        # Behind its last layer a cache fetches the first again; behind ours, which stands last, it would not.
        cache.prefetch(0, cache.only_non_sliding)
