"""Two towers that see every image together, each in a size of its own."""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.patching.geometry.fixed import FixedGrid
from flexkit.patching.geometry.patches import merged_patches
from flexkit.patching.geometry.tiles import encode_in_two_sizes
from flexkit.zoom import Pair

__all__ = ["TwoSizes"]


class TwoSizes(FixedGrid):
    """Every image in the sizes of two towers, whose features make one grid of tokens together (DeepSeek-VL hybrid).

    Both views are cut into the same tiles.
    """

    inputs = ("pixel_values", "high_res_pixel_values")

    def __init__(self) -> None:
        super().__init__(merged_patches, encode=encode_in_two_sizes)

    def grids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], zoom: Pair) -> list[Pair]:
        grids = super().grids(model, inputs, zoom)
        larger, size = inputs["high_res_pixel_values"], model.config.high_res_vision_config.image_size
        expected = (*inputs["pixel_values"].shape[:2], zoom[0] * size, zoom[1] * size)
        if tuple(larger.shape) != expected:
            raise HighResInputError(
                f"hd_high_res_pixel_values has shape {tuple(larger.shape)}; expected {expected}: the images of "
                f"hd_pixel_values, zoom {zoom} times the larger tower's {size} pixels."
            )
        return grids
