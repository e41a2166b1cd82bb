"""Features of the tiles in which a token has been read: as if all had been encoded, and each encoded once."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexkit.attention.ragged import RaggedIndex
from flexkit.grids import stitch_tiles
from flexkit.patching.memory import Encoded, HighResMemory, Tiled, TiledImage
from flexkit.patching.memory.tokens import ImageSpan, alike, by_rows

DIM = 3
SHAPES = [((2, 2), (1, 1)), ((2, 3), (2, 1)), ((1, 2), (3, 2))]
"""Cells of a tile, and tiles along rows and columns."""


class Pictures:
    """Tiles whose cells are numbered, and what has been encoded of them."""

    def __init__(self, shapes: Sequence[tuple[Any, Any]], first: int = 0) -> None:
        self.shapes, self.first, self.encoded = shapes, first, list[tuple[int, int]]()

    def cells(self, picture: int) -> Tensor:
        """``(tiles, cells, dim)``."""
        (rows, columns), (down, across) = self.shapes[picture]
        count = down * across * rows * columns
        numbers = 1000.0 * (self.first + picture + 1) + torch.arange(count, dtype=torch.float64)
        return torch.stack([numbers, -numbers, numbers**2], -1).view(down * across, rows * columns, DIM)

    def read(self, picture: int, tiles: Tensor) -> list[Tensor]:
        """What stands for pixels: which tiles these are."""
        self.encoded += [(picture, tile) for tile in tiles.tolist()]
        return [torch.stack([torch.full_like(tiles, self.first + picture), tiles], dim=-1)]

    def encode(self, tiles: Sequence[Tensor]) -> Tensor:
        """The cells of such tiles."""
        return torch.stack([self.cells(picture - self.first)[tile] for picture, tile in tiles[0].tolist()])

    def memory(self, rows: Sequence[int]) -> HighResMemory:
        """Of pictures that stand in some batch rows, none of whose tiles has been encoded."""
        images, spans = [], []
        for picture, (grid, zoom) in enumerate(self.shapes):
            images.append(TiledImage(partial(self.read, picture), grid, zoom))
            spans.append(ImageSpan(rows[picture], torch.arange(4), grid, zoom, 0, picture, None, 4))
        none = torch.zeros(1, DIM, dtype=torch.float64)
        return HighResMemory.laid_out(Tiled(none, tuple(images)), spans, max(rows) + 1)

    def expected(self, memory: HighResMemory) -> Tensor:
        """``(batch, tokens, dim)``: all of them in raster order, zero where rows are padded."""
        whole = torch.zeros(memory.batch, memory.tokens, DIM, dtype=torch.float64)
        for picture, (span, (grid, zoom)) in enumerate(zip(memory.images, self.shapes, strict=True)):
            stitched = stitch_tiles(self.cells(picture)[None], grid, zoom).flatten(0, 2)
            whole[span.row, span.start : span.start + span.tokens] = stitched
        return whole


@st.composite
def pictures(draw: st.DrawFn) -> tuple[Pictures, list[int]]:
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    rows = sorted(draw(st.lists(st.integers(0, 2), min_size=len(shapes), max_size=len(shapes))))
    return Pictures(shapes), rows


def wanted(draw: Any, memory: HighResMemory) -> RaggedIndex:
    """Some tokens of the pictures in every batch row, or all."""
    real = memory.ends < torch.iinfo(torch.int64).max
    if draw(st.booleans()):
        return memory.all_tokens
    flips = draw(st.lists(st.booleans(), min_size=real.numel(), max_size=real.numel()))
    return RaggedIndex(torch.tensor(flips).view(real.shape) & real)


def check(found: Tensor, expected: Tensor, tokens: RaggedIndex) -> None:
    theirs = tokens.gather(expected).masked_fill(~tokens.valid[..., None], 0)
    assert torch.equal(found.masked_fill(~tokens.valid[..., None], 0), theirs)


@given(pictures(), st.data())
def test_what_is_read_is_what_all_tiles_hold_and_each_is_encoded_once(
    drawn: tuple[Pictures, list[int]], data: st.DataObject
) -> None:
    own, rows = drawn
    memory = own.memory(rows)
    for _ in range(3):
        tokens = wanted(data.draw, memory)
        found = memory.features.of(tokens, memory.images, [own.encode])
        check(found, own.expected(memory), tokens)
        assert memory.features.opened == len(own.encoded) == len(set(own.encoded))
    memory.features.of(memory.all_tokens, memory.images, [own.encode])
    assert sorted(own.encoded) == [
        (picture, tile) for picture in range(len(rows)) for tile in range(len(own.cells(picture)))
    ]


@given(pictures(), pictures(), st.data())
def test_later_pictures_join_whatever_has_been_encoded(
    one: tuple[Pictures, list[int]], two: tuple[Pictures, list[int]], data: st.DataObject
) -> None:
    (first, rows), second = one, Pictures((two[0].shapes * 4)[: len(one[1])], first=len(one[1]))
    memories = first.memory(rows), second.memory(rows)
    for memory, own in zip(memories, (first, second), strict=True):
        memory.features.of(wanted(data.draw, memory), memory.images, [own.encode])
    both = memories[0].joined(memories[1])
    assert both.features.opened == len(first.encoded) + len(second.encoded)

    def encode(tiles: Sequence[Tensor]) -> Tensor:
        owners = [first if picture < second.first else second for picture in tiles[0][:, 0].tolist()]
        return torch.cat([own.encode([tile[None]]) for own, tile in zip(owners, tiles[0], strict=True)])

    found = both.features.of(both.all_tokens, both.images, [encode])
    expected = torch.cat([own.expected(memory) for own, memory in zip((first, second), memories, strict=True)], dim=1)
    assert torch.equal(found, expected)
    everything = sum(len(own.cells(picture)) for own in (first, second) for picture in range(len(rows)))
    assert both.features.opened == len(first.encoded) + len(second.encoded) == everything


@given(pictures(), st.data())
def test_what_was_encoded_as_a_whole_is_the_same_in_tiles(
    drawn: tuple[Pictures, list[int]], data: st.DataObject
) -> None:
    own, rows = drawn
    memory = own.memory(rows)
    tiled, tokens = Encoded(own.expected(memory)).tiled(memory.images), wanted(data.draw, memory)
    check(tiled.of(tokens, memory.images, []), own.expected(memory), tokens)


@given(pictures())
def test_tables_of_images_that_are_alike_stand_where_their_tokens_do(drawn: tuple[Pictures, list[int]]) -> None:
    own, rows = drawn
    memory = own.memory(rows)
    expected = own.expected(memory)
    images = [spans for spans, positions in alike(memory.images) if positions is None]
    tables = [
        torch.stack([expected[span.row, span.start : span.start + span.tokens] for span in spans]) for spans in images
    ]
    axes = [torch.stack([table, -table]) for table in tables]
    assert sum(map(len, images)) == len(rows)
    assert torch.equal(by_rows(images, tables, memory.batch, memory.tokens), expected)
    assert torch.equal(by_rows(images, axes, memory.batch, memory.tokens), torch.stack([expected, -expected]))
