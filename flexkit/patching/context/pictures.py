"""Pictures of one size: the high-res view is cut into tiles, and each takes the place of its image."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.grids import Grid, Pair, split_tiles, stitch_tiles
from flexkit.patching.context.arrangements import Arrangement, OneARow
from flexkit.patching.context.beside import Beside, Context, Places
from flexkit.patching.geometry.base import Axis, Declared
from flexkit.patching.memory.tokens import TOGETHER

__all__ = ["Padding", "Page", "Pictures"]


def _patch_size(config: Any) -> int:
    """Side of a cell in pixels, as most configs say it."""
    return int(config.vision_config.patch_size)


@dataclass(frozen=True)
class Padding:
    """How a family says where its pictures are padded."""

    mask: str
    """The input, True or 1 where there is a picture."""
    whole_cells: bool
    """Whether a cell with some padding in it counts as padding."""

    def grids(self, mask: Tensor, cell: int) -> list[Pair]:
        """Rows and columns of the cells that are a picture, of masks ``(images, height, width)``."""
        rest = 0 if self.whole_cells else cell - 1
        heights, widths = mask[:, :, 0].long().sum(1), mask[:, 0].long().sum(1)
        return [(rows, columns) for rows, columns in ((torch.stack([heights, widths], 1) + rest) // cell).tolist()]


class Pictures(Context):
    """Pictures ``(images, 3, height, width)``, whose cells are squares of pixels.

    Parameters
    ----------
    route : Beside
        Which attention reads them, and how a call reaches it.
    prefix : int
        Columns of an image in front of its cells: class tokens, a mean.
    cell : callable
        From the model's config to the side of a cell in pixels.
    arrangement : Arrangement
        How images lie in a batch.
    padding : Padding, optional
        How the family says where pictures are padded.
    overview_only : str
        What makes the family's prompts carry overviews only.
    """

    inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    default_zoom = 3

    def __init__(
        self,
        route: Beside,
        *,
        prefix: int = 0,
        cell: Callable[[Any], int] = _patch_size,
        arrangement: Arrangement | None = None,
        padding: Padding | None = None,
        overview_only: str = "",
    ) -> None:
        super().__init__(route)
        self._prefix = prefix
        self._cell = cell
        self._arrangement = arrangement or OneARow()
        self._padding = padding
        self.overview_only = overview_only

    def declared(self, model: PreTrainedModel, zoom: Grid) -> Mapping[str, Declared]:
        axes: tuple[Axis, ...] = (*self._arrangement.view_axes, 3, "height", "width")
        return {"pixel_values": Declared(axes, meaning=f"the last two {zoom} times those of pixel_values")}

    def grids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], zoom: Grid) -> list[Pair]:
        pixels, cell = inputs["pixel_values"], self._cell(model.config)
        sides = tuple(pixels.shape[-2:])
        if sides[0] % zoom[0] or sides[1] % zoom[1]:
            raise HighResInputError(
                f"hd_pixel_values has shape {tuple(pixels.shape)}; expected the last two {zoom} times those of "
                "pixel_values."
            )
        # A model does not look at the rest of a cell at the edge.
        grid = sides[0] // zoom[0] // cell, sides[1] // zoom[1] // cell
        return [grid] * len(pixels.flatten(0, -4))

    def check_low_res(self, model: PreTrainedModel, inputs: Mapping[str, object], grids: Sequence[Grid]) -> None:
        pixels: Any = inputs["pixel_values"]
        cell = self._cell(model.config)
        if inputs.get("pixel_values_local") is not None:
            raise HighResInputError(f"The prompt must carry overviews only: {self.overview_only}.")
        if pixels.ndim not in self._arrangement.axes:
            raise HighResInputError(
                f"pixel_values has shape {tuple(pixels.shape)}; with a high-res view, expected "
                f"{' or '.join(map(str, self._arrangement.axes))} axes."
            )
        low = pixels.shape[-2] // cell, pixels.shape[-1] // cell
        if low != grids[0] or self._arrangement.pictures(pixels) != len(grids):
            raise HighResInputError(
                f"pixel_values shows {self._arrangement.pictures(pixels)} images of {low} cells; hd_pixel_values is a "
                f"zoom of {len(grids)} images of {grids[0]}. Pass one high-res view for each image of the prompt, in "
                "its order."
            )

    def places(self, model: PreTrainedModel, inputs: Mapping[str, Any], grids: Sequence[Grid]) -> Places:
        rows, columns = grids[0]
        places = self._arrangement.places(model.config, inputs, self._prefix, rows * columns)
        if len(places.rows) != len(grids):
            raise HighResInputError(
                f"the prompt holds {len(places.rows)} images, {len(grids)} high-res views were given."
            )
        return places

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Grid], zoom: Grid
    ) -> list[Tensor]:
        pixels, cell = inputs["pixel_values"], self._cell(model.config)
        places = self.places(model, inputs, grids)
        shown = self._shown(inputs, cell) or grids
        size = pixels.shape[-2], pixels.shape[-1]
        tiles = _cut(inputs["hd_pixel_values"].flatten(0, -4), shown, zoom, cell, size)
        at_once = max(1, TOGETHER // len(pixels.flatten(0, -4)))
        encoded = []
        for several in torch.split(tiles, at_once, dim=1):
            times = several.shape[1]
            view = torch.cat([self._arrangement.put(tile, pixels) for tile in several.unbind(1)])
            states = self.route.show(model, inputs, len(several), times, pixel_values=view)
            states = states.reshape(times, places.batch, -1, states.shape[-1])
            each = zip(places.rows, places.columns, strict=True)
            encoded.append(torch.stack([states[:, row, columns.to(states.device)] for row, columns in each]))
        each_image = zip(torch.cat(encoded, 1), shown, grids, strict=True)
        return [_stitched(features, own, grid, zoom) for features, own, grid in each_image]

    def _shown(self, inputs: Mapping[str, Any], cell: int) -> list[Pair] | None:
        """Rows and columns of every image without padding, if the inputs say where they are padded."""
        if self._padding is None or (mask := inputs.get(self._padding.mask)) is None:
            return None
        return self._padding.grids(self._arrangement.masks(mask, inputs["pixel_values"]), cell)


class Page(Pictures):
    """One picture of a page for every row, words with boxes on it, and an encoder in which words take patches in.

    A patch on which a word lies has no key of its own but the word's.
    """

    def places(self, model: PreTrainedModel, inputs: Mapping[str, Any], grids: Sequence[Grid]) -> Places:
        boxes = _boxes(inputs)
        side = grids[0][1]
        batch, words = boxes.shape[:2]
        x, y = ((boxes[..., :2] + boxes[..., 2:]) / 2 * side).floor().long().clamp(0, side - 1).unbind(-1)
        columns = []
        for row in range(batch):
            left = torch.ones(side * side, dtype=torch.bool, device=boxes.device)
            left[y[row] * side + x[row]] = False  # by words without a place, too
            # A patch that the model has dropped altogether is looked at where the next one is.
            behind = words + (left.cumsum(0) - left.long()).clamp_max(int(left.sum()) - 1)
            middle = boxes[row].mean(-1)
            for word in ((middle != 0) & (middle != 1)).nonzero().flatten():
                behind[y[row, word] * side + x[row, word]] = word
            columns.append(behind)
        return Places(batch, list(range(batch)), columns)

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Grid], zoom: Grid
    ) -> list[Tensor]:
        encoder: Any = model.get_submodule("encoder")
        boxes, text = _boxes(inputs), inputs.get("inputs_embeds")
        batch, words = boxes.shape[:2]
        mask = inputs.get("attention_mask", boxes.new_ones(batch, words, dtype=torch.long))
        given = {name: value for name, value in inputs.items() if name not in ("input_ids", "pixel_values")}
        if text is None:
            with torch.no_grad():
                text = encoder.embed_tokens(inputs["input_ids"])
        rows, columns = grids[0]
        y, x = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(boxes.device).unbind(-1)
        cells = torch.stack([x / columns, y / rows, (x + 1) / columns, (y + 1) / rows], dim=-1)
        down, right = torch.cartesian_prod(torch.arange(zoom[0]), torch.arange(zoom[1])).to(boxes.device).unbind(-1)
        corners = torch.stack([right, down, right, down], dim=-1)[:, None]
        cells = ((cells + corners) / boxes.new_tensor([zoom[1], zoom[0]] * 2)).to(boxes)
        at_once = max(1, TOGETHER // batch)
        tiles = split_tiles(inputs["hd_pixel_values"], zoom)
        encoded = []
        for several, places in zip(torch.split(tiles, at_once, dim=1), torch.split(cells, at_once), strict=True):
            times = len(places)
            with torch.no_grad():
                patches = encoder.embed_patches(several.transpose(0, 1).flatten(0, 1))
            states = self.route.show(
                model,
                given,
                batch,
                times,
                inputs_embeds=torch.cat([text.repeat(times, 1, 1), patches], dim=1),
                bbox=torch.cat([boxes.repeat(times, 1, 1), places.repeat_interleave(batch, 0)], dim=1),
                attention_mask=torch.cat([mask, mask.new_ones(batch, rows * columns)], dim=1).repeat(times, 1),
            )
            encoded.append(rearrange(states[:, words:], "(t b) n d -> b t n d", b=batch))
        return list(rearrange(stitch_tiles(torch.cat(encoded, 1), grids[0], zoom), "n r c d -> n (r c) d"))


def _cut(view: Tensor, grids: Sequence[Grid], zoom: Grid, cell: int, size: Pair) -> Tensor:
    """Tiles of high-res views, each in the corner where its low-res picture is.

    Parameters
    ----------
    view : torch.Tensor
        ``(images, channels, height, width)``; what is behind the last whole cell is not looked at.
    grids : sequence of tuple of int
        Rows and columns of the cells of each low-res picture, without padding.
    zoom : tuple of int
        Tiles along rows and columns.
    cell : int
        Side of a cell in pixels.
    size : tuple of int
        Height and width of a low-res picture with its padding.

    Returns
    -------
    torch.Tensor
        ``(images, tiles, channels, *size)``.
    """
    tiles = []
    for picture, (rows, columns) in zip(view, grids, strict=True):
        height, width = rows * cell, columns * cell
        parts = split_tiles(picture[None, :, : zoom[0] * height, : zoom[1] * width], zoom)
        tiles.append(pad(parts, (0, size[1] - width, 0, size[0] - height)))
    return torch.cat(tiles)


def _stitched(tiles: Tensor, own: Grid, grid: Grid, zoom: Grid) -> Tensor:
    """Features of an image from those of its tiles; zero where it is padded.

    Parameters
    ----------
    tiles : torch.Tensor
        ``(tiles, rows * columns, dim)``.
    own : tuple of int
        Rows and columns of the low-res picture without padding.
    grid : tuple of int
        The same with it.
    zoom : tuple of int
        Tiles along rows and columns.

    Returns
    -------
    torch.Tensor
        ``(zoom_rows * rows * zoom_columns * columns, dim)``, of the grid with padding.
    """
    cells = rearrange(tiles, "t (r c) d -> t r c d", r=grid[0])[:, : own[0], : own[1]]
    whole = stitch_tiles(cells.flatten(1, 2)[None], own, zoom)[0]
    rows, columns = (times * (full - part) for times, full, part in zip(zoom, grid, own, strict=True))
    return pad(whole, (0, 0, 0, columns, 0, rows)).flatten(0, 1)


def _boxes(inputs: Mapping[str, Any]) -> Tensor:
    """``(batch, words, 4)``, floating; a tokenizer may give integers."""
    boxes: Tensor = inputs["bbox"]
    return boxes if boxes.is_floating_point() else boxes.float()
