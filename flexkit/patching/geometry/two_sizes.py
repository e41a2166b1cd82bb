"""Two towers that see every image together, each in a size of its own."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from flexkit.grids import Pair
from flexkit.patching.declared import Declared
from flexkit.patching.geometry.fixed import FixedGrid
from flexkit.patching.geometry.patches import merged_patches
from flexkit.patching.geometry.tiles import encode_in_two_sizes

__all__ = ["TwoSizes"]


class TwoSizes(FixedGrid):
    """Every image in the sizes of two towers, whose features make one grid of tokens together (DeepSeek-VL hybrid).

    Both views are cut into the same tiles.
    """

    inputs = ("pixel_values", "high_res_pixel_values")

    def __init__(self) -> None:
        super().__init__(merged_patches, encode=encode_in_two_sizes)

    def declared(self, model: PreTrainedModel, zoom: Pair) -> Mapping[str, Declared]:
        declared, size = super().declared(model, zoom), model.config.high_res_vision_config.image_size
        axes = (*declared["pixel_values"].axes[:2], zoom[0] * size, zoom[1] * size)
        meaning = f"the images of hd_pixel_values, zoom {zoom} times the larger tower's {size} pixels"
        return {**declared, "high_res_pixel_values": Declared(axes, meaning=meaning)}
