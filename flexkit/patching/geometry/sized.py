"""Pictures padded to one size, with the height and width of each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.grids import Pair
from flexkit.patching.declared import Declared
from flexkit.patching.geometry.anysize import SIZES, AnySize, pairs
from flexkit.patching.geometry.features import image_features
from flexkit.patching.geometry.layouts import cells_alone

__all__ = ["SizedImages"]


class SizedImages(AnySize):
    """Pictures padded to the largest of a batch, with ``(height, width)`` of each (Pixtral towers, Emu3).

    Parameters
    ----------
    cell : callable
        From the model's config to the side of one cell in pixels.
    layout : callable
        From a grid to the mask of the image tokens of one image that are its cells.
    """

    inputs = ("pixel_values", "image_sizes")
    size_input = "image_sizes"

    def __init__(self, cell: Callable[[Any], int], *, layout: Callable[[Pair], Tensor] = cells_alone) -> None:
        super().__init__(cell)
        self._layout = layout

    def declared(self, model: PreTrainedModel, zoom: Pair) -> Mapping[str, Declared]:
        return {"pixel_values": Declared(("images", 3, "height", "width")), "image_sizes": SIZES}

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], prefix: str) -> list[Pair]:
        pixels, sizes = inputs["pixel_values"], pairs(inputs["image_sizes"])
        height, width = (max(lengths) for lengths in zip(*sizes, strict=True))
        if pixels.shape[2] < height or pixels.shape[3] < width:
            raise HighResInputError(
                f"{prefix}pixel_values has shape {tuple(pixels.shape)}; expected ({len(sizes)}, channels, height, "
                f"width) that hold {prefix}image_sizes {sizes}."
            )
        return sizes

    def layout(self, model: PreTrainedModel, grid: Pair) -> Tensor:
        return self._layout(grid)

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Pair], zoom: Pair
    ) -> list[Tensor]:
        # One by one: towers attend across the batch behind a mask, or see the padding.
        features = []
        for pixels, size, (rows, columns) in zip(inputs["pixel_values"], inputs["image_sizes"], grids, strict=True):
            height, width = size.tolist()
            (view,) = image_features(model, pixel_values=pixels[None, :, :height, :width], image_sizes=size[None])
            features.append(view[self._layout((rows * zoom[0], columns * zoom[1])).to(view.device)])
        return features
