"""The high-res tokens of images: where each image stands, and features, encoded at once or when they are first read."""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from flexkit.attention.ragged import RaggedIndex
from flexkit.grids import Grid

__all__ = [
    "TOGETHER",
    "Encode",
    "Encoded",
    "Features",
    "ImageSpan",
    "Prefix",
    "ReadTiles",
    "Tiled",
    "TiledImage",
    "alike",
    "by_rows",
    "no_tiles",
    "tokens_by_image",
]

TOGETHER = 64
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


def alike(spans: Sequence[ImageSpan]) -> list[tuple[list[ImageSpan], Tensor | None]]:
    """Images of the same grid and zoom, with the rotary positions of their low-res tokens.

    Returns
    -------
    list of tuple
        For each grid and zoom the images, and their positions ``(axes, images, cells)``; None if these are unknown.
    """
    kinds: dict[tuple[Grid, Grid], list[ImageSpan]] = {}
    for span in spans:
        kinds.setdefault((span.grid, span.zoom), []).append(span)
    known = ([span.positions for span in images if span.positions is not None] for images in kinds.values())
    return [
        (images, torch.stack(positions, dim=1) if len(positions) == len(images) else None)
        for images, positions in zip(kinds.values(), known, strict=True)
    ]


def by_rows(images: Sequence[Sequence[ImageSpan]], tables: Sequence[Tensor], batch: int, tokens: int) -> Tensor:
    """What stands in tables of images that are alike, by batch rows; zero where these are padded.

    Parameters
    ----------
    images : sequence of sequence of ImageSpan
        Of each table, as :func:`alike` gives them.
    tables : sequence of torch.Tensor
        ``(..., images, tokens, dim)``.
    batch, tokens : int
        Of the memory.

    Returns
    -------
    torch.Tensor
        ``(..., batch, tokens, dim)``.
    """
    first = tables[0]
    if len(tables) == 1 and [span.row for span in images[0]] == list(range(batch)):
        return first
    whole = first.new_zeros(*first.shape[:-3], batch, tokens, first.shape[-1])
    for spans, table in zip(images, tables, strict=True):
        rows, starts = torch.tensor([(span.row, span.start) for span in spans], device=first.device).T[..., None]
        whole[..., rows, starts + torch.arange(table.shape[-2], device=first.device), :] = table
    return whole


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
        images = tuple(TiledImage(_nothing, (span.tokens, 1), (1, 1)) for span in spans)
        cells = [self.states[span.row, span.start : span.start + span.tokens] for span in spans]
        whole = Tiled(torch.cat([torch.zeros_like(cells[0][:1]), *cells]), images)
        whole.used, whole.opened = len(whole.cells), len(images)
        whole.firsts[:-1] = torch.tensor([*accumulate(map(len, cells[:-1]), initial=1)], device=self.device)
        return whole


def _nothing(tiles: Tensor) -> Sequence[Tensor]:
    """What is left to be read of an image that has been encoded."""
    return ()


@dataclass(frozen=True, eq=False)
class TiledImage:
    """One image, or video, in tiles."""

    read: ReadTiles
    grid: Grid
    """Cells of a tile."""
    zoom: Grid
    """Tiles along [frames,] rows and columns."""
    kind: int = 0
    """Which encodes them, of what encodes images and what encodes videos."""


@dataclass(eq=False)
class Tiled(Features):
    """Those of the tiles in which a token has been read; rows may share an image."""

    cells: Tensor
    """``(room, dim)``: a zero, the cells of the tiles that have been encoded, and room for some more."""
    images: tuple[TiledImage, ...] = ()
    used: int = 1
    """How many of them mean something."""
    opened: int = 0
    """How many tiles have been encoded."""
    firsts: Tensor = field(init=False)
    """``(tiles + 1,)``, int64: where in :attr:`cells` the first of each tile is, image by image; -1 if it has not been
    encoded. The last one is of tokens that are none, where rows are padded."""
    _placed: tuple[object, Tensor, Tensor] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self.firsts = torch.full(
            (sum(math.prod(image.zoom) for image in self.images) + 1,), -1, device=self.cells.device
        )
        self.firsts[-1] = 0

    @property
    def device(self) -> torch.device:
        return self.cells.device

    @property
    def bytes(self) -> int:
        return self.cells[1:].nbytes

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # which tiles are missing, no graph can tell
    @torch.inference_mode(False)  # what is kept may be added to when that mode has been left
    @torch.no_grad()
    def of(self, wanted: RaggedIndex, spans: Sequence[ImageSpan], encode: Sequence[Encode]) -> Tensor:
        tile, cell = (wanted.gather(each) for each in self._places(spans, wanted))
        if not wanted.full:
            none = ~wanted.valid
            tile, cell = tile.masked_fill(none, len(self.firsts) - 1), cell.masked_fill(none, 0)
        if self.opened < len(self.firsts) - 1:
            self._open(tile, encode)
        return self.cells[self.firsts[tile] + cell]

    def _places(self, spans: Sequence[ImageSpan], wanted: RaggedIndex) -> tuple[Tensor, Tensor]:
        """Tile, and cell in it, of every token of the batch rows, each ``(batch, tokens)``."""
        key = wanted.mask.shape, tuple((span.row, span.start, span.image) for span in spans)
        if self._placed is None or self._placed[0] != key:
            before = [0, *accumulate(math.prod(image.zoom) for image in self.images)]
            tile, cell = np.full(key[0], before[-1]), np.zeros(key[0], dtype=np.int64)
            for span in spans:
                image, own = self.images[span.image], (span.row, slice(span.start, span.start + span.tokens))
                (rows, columns), across = image.grid, image.zoom[-1]  # frames lie one below the other
                row, column = np.divmod(np.arange(span.tokens), columns * across)
                tile[own] = before[span.image] + row // rows * across + column // columns
                cell[own] = row % rows * columns + column % columns
            self._placed = key, torch.from_numpy(tile).to(self.device), torch.from_numpy(cell).to(self.device)
        return self._placed[1], self._placed[2]

    def rows(self, index: Tensor) -> "Tiled":
        return self

    def joined(self, later: "Tiled") -> "Tiled":
        cells = torch.cat([self.cells[: self.used], later.cells[1 : later.used]])
        both = Tiled(cells, self.images + later.images)
        shifted = torch.where(later.firsts > 0, later.firsts + self.used - 1, later.firsts)
        both.firsts, both.used = torch.cat([self.firsts[:-1], shifted]), len(both.cells)
        both.opened = self.opened + later.opened
        return both

    def tiled(self, spans: Sequence[ImageSpan]) -> "Tiled":
        return self

    def _open(self, tile: Tensor, encode: Sequence[Encode]) -> None:
        """Encode what is missing of tiles that are looked at."""
        looked_at = torch.zeros_like(self.firsts, dtype=torch.bool).index_fill(0, tile.flatten(), True)
        lacks = (looked_at & (self.firsts < 0)).tolist()  # one wait
        missing: list[tuple[TiledImage, int, Tensor]] = []
        before = accumulate((math.prod(image.zoom) for image in self.images), initial=0)
        for image, first in zip(self.images, before, strict=False):
            lacking = [tile for tile, lacks_it in enumerate(lacks[first : first + math.prod(image.zoom)]) if lacks_it]
            if lacking:
                missing.append((image, first, torch.tensor(lacking, device=self.device)))
        kinds = sorted({(image.kind, image.grid) for image, _, _ in missing})
        of_kinds = ([each for each in missing if (each[0].kind, each[0].grid) == kind] for kind in kinds)
        for batch in (batch for own in of_kinds for batch in _batches(own)):
            views = zip(*(image.read(tiles) for image, _, tiles in batch), strict=True)
            cells = encode[batch[0][0].kind]([torch.cat(view) for view in views])
            end = self.used + cells.shape[:2].numel()
            if end > len(self.cells):  # by half at least: a generation opens tiles one by one
                most = 1 + sum(math.prod((*image.zoom, *image.grid)) for image in self.images)
                room = min(most, max(end, self.used + self.used // 2))
                grown = torch.zeros(room, cells.shape[-1], dtype=cells.dtype, device=self.device)
                if self.opened:
                    grown[: self.used] = self.cells[: self.used]
                self.cells = grown
            self.cells[self.used : end] = cells.flatten(0, 1)
            tiles = torch.cat([first + tiles for _, first, tiles in batch])
            self.firsts = self.firsts.index_copy(
                0, tiles, torch.arange(self.used, end, cells.shape[1], device=self.device)
            )
            self.used, self.opened = end, self.opened + len(tiles)


def _batches(missing: Sequence[tuple[TiledImage, int, Tensor]]) -> Iterator[list[tuple[TiledImage, int, Tensor]]]:
    """The same tiles, so many at a time as are encoded together."""
    batch: list[tuple[TiledImage, int, Tensor]] = []
    room = TOGETHER
    for image, first, tiles in missing:
        while len(tiles):
            batch.append((image, first, tiles[:room]))
            tiles, room = tiles[room:], room - len(tiles[:room])
            if not room:
                yield batch
                batch, room = [], TOGETHER
    if batch:
        yield batch
