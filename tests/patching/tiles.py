"""Views in tiles that remember which of them were read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import flexkit
from flexkit.encoding import pyramid
from tests.patching.reference import Image
from tests.zoo import FAMILIES, IMAGE, Grid, Row, low_res, prompt


class Noise(flexkit.TileView):
    """Tiles of noise."""

    def __init__(self, size: int, zoom: Grid, levels: int, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.zooms = pyramid(zoom, levels)
        self.tiles = [torch.randn(z * y, 3, size, size, generator=random, dtype=torch.float64) for z, y in self.zooms]
        self.reads: list[list[int]] = [[] for _ in self.zooms]
        """For each level the tiles that were read, in order."""

    def read(self, level: int, tiles: Sequence[int]) -> tuple[Tensor, ...]:
        self.reads[level].extend(tiles)
        return (self.tiles[level][list(tiles)],)

    def whole(self, level: int) -> Tensor:
        """``(3, height, width)``: all tiles of a level in their places."""
        rows, columns = self.zooms[level]
        lines = [torch.cat(list(self.tiles[level][row * columns : (row + 1) * columns]), dim=2) for row in range(rows)]
        return torch.cat(lines, dim=1)


def tiled_prompt(
    name: str, rows: Sequence[Row], zoom: Grid, levels: int, *, padding: str = "left", seed: int = 1
) -> dict[str, Any]:
    """A prompt whose images are given in tiles of noise."""
    inputs: dict[str, Any] = low_res(prompt(FAMILIES[name], rows, padding=padding, seed=seed))
    size = FAMILIES[name].config().vision_config.image_size
    images = sum(len(row.images) for row in rows)
    return inputs | {"hd_tiles": [Noise(size, zoom, levels, 100 * seed + image) for image in range(images)]}


@torch.no_grad()
def images_of_level(model: Any, name: str, inputs: dict[str, Any], level: int) -> list[Image]:
    """Every image with the features of one level in raster order, tile by tile."""
    images, (rows, columns) = [], FAMILIES[name].grid
    views = iter(inputs["hd_tiles"])
    for row, ids in enumerate(inputs["input_ids"]):
        places = (ids == IMAGE).nonzero().flatten()
        for own in places.split(rows * columns) if len(places) else ():
            view = next(views)
            lines = []
            for i in range(view.zooms[level][0]):
                tiles = []
                for j in range(view.zooms[level][1]):
                    tile = view.tiles[level][i * view.zooms[level][1] + j]
                    tokens = model.get_image_features(pixel_values=tile[None], return_dict=True).pooler_output[0]
                    tiles.append(tokens.reshape(rows, columns, -1))
                lines.append(torch.cat(tiles, dim=1))
            images.append(Image(row, (rows, columns), own, torch.cat(lines, dim=0).flatten(0, 1)))
    return images
