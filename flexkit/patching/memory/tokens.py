"""The high-res tokens of images: where each image stands, and features, encoded at once or when they are first read."""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from flexkit.attention.ragged import RaggedIndex
from flexkit.grids import Grid

__all__ = [
    "Encode",
    "Encoded",
    "Features",
    "ImageSpan",
    "Prefix",
    "ReadTiles",
    "Tiled",
    "TiledImage",
    "no_tiles",
    "tokens_by_image",
]

_TOGETHER = 64
"""How many tiles are read and encoded at a time, which bounds the memory that they take up."""

ReadTiles = Callable[[Tensor], Sequence[Tensor]]
"""From indices of tiles to these, ``(tiles, channels, height, width)`` in every size that the model takes."""
Encode = Callable[[Sequence[Tensor]], Tensor]
"""From tiles ``(tiles, channels, height, width)``, in every size that a model takes them in, to their cells
``(tiles, cells, dim)``."""


@dataclass(frozen=True)
class Prefix:
    """What the last low-res token of an image sees in one layer, up to and with itself."""

    visible: Tensor
    """``(columns,)``, bool: which keys."""
    key: Tensor | None = None
    """``(key_heads, columns, head_dim)``; None where the cache keeps them."""
    value: Tensor | None = None
    """``(key_heads, columns, value_dim)``."""


@dataclass(frozen=True, eq=False)
class ImageSpan:
    """Where one image, or video, stands: its low-res tokens in the sequence, its high-res tokens in the memory."""

    row: int
    """Batch row of the image."""
    columns: Tensor
    """``(cells,)``, int64: positions of the low-res tokens in the whole sequence, raster order, frame by frame."""
    grid: Grid
    zoom: Grid
    start: int
    """Index of the first high-res token in the memory's row."""
    image: int
    """Which image it is; rows of one sample may share one."""
    margins: Tensor | None
    """``(2,)``, int64: padded cells on each side, along rows and columns; None where there are none."""
    end: int
    """Position behind the last low-res token; 0 for columns of a context beside the sequence."""
    positions: Tensor | None = None
    """``(axes, cells)``: rotary positions of the low-res tokens, known once the text model has run them all."""
    level: int = 0
    """Which level of a pyramid of zooms; every level has a span of its own."""
    prefix: Mapping[int, Prefix] = field(default_factory=dict)
    """What high-res tokens see in each layer besides themselves, where they have states of their own."""
    typed: Mapping[str, Tensor] = field(default_factory=dict)
    """What else the text model is told of each of its tokens, by the name of the argument."""
    begin: int | None = None
    """Position of the first low-res token, where nothing stands between these."""

    @property
    def tokens(self) -> int:
        """Number of high-res tokens."""
        return math.prod(self.grid) * math.prod(self.zoom)


def tokens_by_image(spans: Sequence[ImageSpan], tokens: RaggedIndex) -> list[tuple[ImageSpan, Any, Tensor | None]]:
    """For every image where tokens of it stand among ``tokens``, and which of the image they are; None for all."""
    if tokens.whole:
        return [(span, slice(span.start, span.start + span.tokens), None) for span in spans]
    found: list[tuple[ImageSpan, Any, Tensor | None]] = []
    images = Counter(span.row for span in spans)
    for span in spans:
        local = tokens.index[span.row] - span.start
        if tokens.full and images[span.row] == 1:  # all of the row's: nobody has to look
            found.append((span, slice(0, tokens.count), local))
            continue
        place = (tokens.valid[span.row] & (local >= 0) & (local < span.tokens)).nonzero().flatten()
        found.append((span, place, local[place]))
    return found


def no_tiles(tiles: Sequence[Tensor]) -> Tensor:
    """Of a geometry that encodes views as a whole."""
    raise NotImplementedError("a geometry whose `cut` gives tiles needs `encode_tiles` too.")


class Features(ABC):
    """Projected image features of the tokens of every batch row; zero where rows are padded."""

    images: tuple["TiledImage", ...] = ()
    """Those in tiles."""

    @property
    def opened(self) -> int | None:
        """How many tiles have been encoded; None where all views were, as a whole."""
        return None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where they are."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """What they take up."""

    @abstractmethod
    def of(self, wanted: RaggedIndex, spans: Sequence[ImageSpan], encode: Sequence[Encode]) -> Tensor:
        """``(batch, wanted, dim)``, for images that stand where ``spans`` say, encoded by what encodes their kind."""

    @abstractmethod
    def rows(self, index: Tensor) -> Self:
        """Those of other batch rows."""

    @abstractmethod
    def joined(self, later: Self) -> Self:
        """These, followed by those of later images in the same rows."""

    @abstractmethod
    def tiled(self, spans: Sequence[ImageSpan]) -> "Tiled":
        """The same in tiles; of images that were encoded as a whole, one for each of the ``spans`` where they stand."""


@dataclass(frozen=True)
class Encoded(Features):
    """All of them."""

    states: Tensor
    """``(batch, tokens, dim)``."""

    @property
    def device(self) -> torch.device:
        return self.states.device

    @property
    def bytes(self) -> int:
        return self.states.nbytes

    def of(self, wanted: RaggedIndex, spans: Sequence[ImageSpan], encode: Sequence[Encode]) -> Tensor:
        return wanted.gather(self.states)

    def rows(self, index: Tensor) -> "Encoded":
        return Encoded(self.states[index])

    def joined(self, later: "Encoded") -> "Encoded":
        return Encoded(torch.cat([self.states, later.states], dim=1))

    def tiled(self, spans: Sequence[ImageSpan]) -> "Tiled":
        images = []
        for span in spans:
            cells = self.states[None, span.row, span.start : span.start + span.tokens]
            images.append(TiledImage(_nothing, (span.tokens, 1), (1, 1), cells[:0]))
            images[-1].add(torch.zeros(1, dtype=torch.int64, device=cells.device), cells)
        return Tiled(tuple(images))


def _nothing(tiles: Tensor) -> Sequence[Tensor]:
    """What is left to be read of an image that has been encoded."""
    return ()


@dataclass
class TiledImage:
    """One image, or video, in tiles, of which some have been encoded."""

    read: ReadTiles
    grid: Grid
    """Cells of a tile."""
    zoom: Grid
    """Tiles along [frames,] rows and columns."""
    cells: Tensor
    """``(room, cells, dim)``: of the tiles that have been encoded, and room for some more."""
    kind: int = 0
    """Which encodes them, of what encodes images and what encodes videos."""
    opened: int = 0
    """How many have been encoded."""
    slots: Tensor = field(init=False)
    """``(tiles,)``, int64: where in :attr:`cells` a tile is; -1 if it has not been encoded."""

    def __post_init__(self) -> None:
        self.slots = torch.full((math.prod(self.zoom),), -1, device=self.cells.device)

    def places(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tile, and cell in it, of tokens in raster order; frames lie one below the other."""
        (rows, columns), across = self.grid, self.zoom[-1]
        row, column = tokens // (columns * across), tokens % (columns * across)
        return row // rows * across + column // columns, row % rows * columns + column % columns

    def add(self, tiles: Tensor, cells: Tensor) -> None:
        """Note what tiles were encoded to."""
        end = self.opened + len(tiles)
        self.slots = self.slots.index_copy(0, tiles, torch.arange(self.opened, end, device=tiles.device))
        if end > len(self.cells):  # by half at least: a generation opens tiles one by one
            room = min(len(self.slots), max(end, self.opened + self.opened // 2))
            grown = cells.new_empty(room, *cells.shape[1:], device=self.cells.device)
            if self.opened:
                grown[: self.opened] = self.cells[: self.opened]
            self.cells = grown
        self.cells[self.opened : end] = cells
        self.opened = end


@dataclass(frozen=True)
class Tiled(Features):
    """Those of the tiles in which a token has been read; rows may share an image."""

    images: tuple[TiledImage, ...]

    @property
    def device(self) -> torch.device:
        return self.images[0].cells.device

    @property
    def bytes(self) -> int:
        return sum(image.cells.nbytes for image in self.images)

    @property
    def opened(self) -> int:
        return sum(image.opened for image in self.images)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # which tiles are missing, no graph can tell
    @torch.inference_mode(False)  # what is kept may be added to when that mode has been left
    @torch.no_grad()
    def of(self, wanted: RaggedIndex, spans: Sequence[ImageSpan], encode: Sequence[Encode]) -> Tensor:
        found = []
        for span, place, tokens in tokens_by_image(spans, wanted):
            image = self.images[span.image]
            tokens = torch.arange(span.tokens, device=wanted.index.device) if tokens is None else tokens
            found.append((image, span.row, place, *image.places(tokens)))
        self._open([(image, tiles) for image, _, _, tiles, _ in found], encode)
        cells = next((image.cells for image in self.images if image.opened), self.images[0].cells)
        states = cells.new_zeros(*wanted.index.shape, cells.shape[-1])
        for image, row, place, tile, cell in found:
            states[row, place] = image.cells[image.slots[tile], cell].to(states.dtype)
        return states

    def rows(self, index: Tensor) -> "Tiled":
        return self

    def joined(self, later: "Tiled") -> "Tiled":
        return Tiled(self.images + later.images)

    def tiled(self, spans: Sequence[ImageSpan]) -> "Tiled":
        return self

    def _open(self, looked_at: Sequence[tuple[TiledImage, Tensor]], encode: Sequence[Encode]) -> None:
        """Encode what is missing of tiles that are looked at."""
        wanted = {id(image): torch.zeros_like(image.slots, dtype=torch.bool) for image in self.images}
        for image, tiles in looked_at:
            wanted[id(image)][tiles] = True
        lacks = iter(torch.cat([wanted[id(image)] & (image.slots < 0) for image in self.images]).tolist())  # one wait
        missing: list[tuple[TiledImage, Tensor]] = []
        for image in self.images:
            lacking = [tile for tile in range(len(image.slots)) if next(lacks)]
            if lacking:
                missing.append((image, torch.tensor(lacking, device=image.slots.device)))
        kinds = sorted({(image.kind, image.grid) for image, _ in missing})
        alike = ([each for each in missing if (each[0].kind, each[0].grid) == kind] for kind in kinds)
        for batch in (batch for own in alike for batch in _batches(own)):
            views = zip(*(image.read(tiles) for image, tiles in batch), strict=True)
            cells = encode[batch[0][0].kind]([torch.cat(view) for view in views])
            parts: Sequence[Tensor] = torch.split(cells, [len(tiles) for _, tiles in batch])
            for (image, tiles), part in zip(batch, parts, strict=True):
                image.add(tiles, part)


def _batches(missing: Sequence[tuple[TiledImage, Tensor]]) -> Iterator[list[tuple[TiledImage, Tensor]]]:
    """The same tiles, so many at a time as are encoded together."""
    batch: list[tuple[TiledImage, Tensor]] = []
    room = _TOGETHER
    for image, tiles in missing:
        while len(tiles):
            batch.append((image, tiles[:room]))
            tiles, room = tiles[room:], room - len(tiles[:room])
            if not room:
                yield batch
                batch, room = [], _TOGETHER
    if batch:
        yield batch
