"""Pictures of one size: the high-res view is cut into tiles, and each takes the place of its image."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.grids import Pair
from flexkit.patching.context.arrangements import Arrangement, OneARow
from flexkit.patching.context.geometry import Context, Places
from flexkit.patching.context.padding import Padding, cut, stitched
from flexkit.patching.declared import Axis, Declared

__all__ = ["Pictures"]


def patch_size(config: Any) -> int:
    """Side of a cell in pixels, as most configs say it."""
    return int(config.vision_config.patch_size)


class Pictures(Context):
    """Pictures ``(images, 3, height, width)``, whose cells are squares of pixels.

    Parameters
    ----------
    sites, source, **options
        As for :class:`~flexkit.patching.context.geometry.Context`.
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
        sites: str,
        source: str,
        *,
        prefix: int = 0,
        cell: Callable[[Any], int] = patch_size,
        arrangement: Arrangement | None = None,
        padding: Padding | None = None,
        overview_only: str = "",
        **options: Any,
    ) -> None:
        super().__init__(sites, source, **options)
        self._prefix = prefix
        self._cell = cell
        self._arrangement = arrangement or OneARow()
        self._padding = padding
        self.overview_only = overview_only

    def declared(self, model: PreTrainedModel, zoom: Pair) -> Mapping[str, Declared]:
        axes: tuple[Axis, ...] = (*self._arrangement.view_axes, 3, "height", "width")
        return {"pixel_values": Declared(axes, meaning=f"the last two {zoom} times those of pixel_values")}

    def grids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], zoom: Pair) -> list[Pair]:
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

    def check_low_res(self, model: PreTrainedModel, inputs: Mapping[str, object], grids: Sequence[Pair]) -> None:
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

    def places(self, model: PreTrainedModel, inputs: Mapping[str, Any], grids: Sequence[Pair]) -> Places:
        rows, columns = grids[0]
        places = self._arrangement.places(model.config, inputs, self._prefix, rows * columns)
        if len(places.rows) != len(grids):
            raise HighResInputError(
                f"the prompt holds {len(places.rows)} images, {len(grids)} high-res views were given."
            )
        return places

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Pair], zoom: Pair
    ) -> list[Tensor]:
        pixels, cell = inputs["pixel_values"], self._cell(model.config)
        places = self.places(model, inputs, grids)
        shown = self._shown(inputs, cell) or grids
        size = pixels.shape[-2], pixels.shape[-1]
        tiles = cut(inputs["hd_pixel_values"].flatten(0, -4), shown, zoom, cell, size)
        encoded = []
        for tile in tiles.unbind(1):
            states = self.show(model, inputs, len(tile), pixel_values=self._arrangement.put(tile, pixels))
            states = states.reshape(places.batch, -1, states.shape[-1])
            each = zip(places.rows, places.columns, strict=True)
            encoded.append(torch.stack([states[row, columns.to(states.device)] for row, columns in each]))
        each_image = zip(torch.stack(encoded, 1), shown, grids, strict=True)
        return [stitched(features, own, grid, zoom) for features, own, grid in each_image]

    def _shown(self, inputs: Mapping[str, Any], cell: int) -> list[Pair] | None:
        """Rows and columns of every image without padding, if the inputs say where they are padded."""
        if self._padding is None or (mask := inputs.get(self._padding.mask)) is None:
            return None
        return self._padding.grids(self._arrangement.masks(mask, inputs["pixel_values"]), cell)
