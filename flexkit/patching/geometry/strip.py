"""Patches of all images side by side, with the rows and columns of each."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.grids import Pair
from flexkit.patching.declared import Declared
from flexkit.patching.geometry.anysize import SIZES, AnySize, pairs

__all__ = ["PatchStrip"]


def _merged_sides(config: Any) -> int:
    merged: int = config.merge_kernel_size[0] ** config.merger_times
    return merged if config.downsample_mode == "4x" else 2 * merged


class PatchStrip(AnySize):
    """Patches in one strip, ``(1, channels, side, patches * side)``, and the shape of each image (MiniCPM-V)."""

    inputs = ("pixel_values", "target_sizes")
    size_input = "target_sizes"
    overview_only = "call the processor with slice_mode=False"

    def __init__(self) -> None:
        super().__init__(_merged_sides)

    def declared(self, model: PreTrainedModel, zoom: Pair) -> Mapping[str, Declared]:
        side = model.config.vision_config.patch_size
        return {"pixel_values": Declared((1, 3, side, "length")), "target_sizes": SIZES}

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], prefix: str) -> list[Pair]:
        strip, sizes = inputs["pixel_values"], pairs(inputs["target_sizes"])
        side = model.config.vision_config.patch_size
        length = side * sum(math.prod(size) for size in sizes)
        if strip.shape[-1] != length:
            raise HighResInputError(
                f"{prefix}pixel_values has shape {tuple(strip.shape)}; expected (1, 3, {side}, {length}): the patches "
                f"of {prefix}target_sizes {sizes} side by side."
            )
        return sizes

    def check_low_res(self, model: PreTrainedModel, inputs: Mapping[str, object], grids: Sequence[Pair]) -> None:
        mode = inputs.get("downsample_mode")
        if mode not in (None, model.config.downsample_mode):
            raise HighResInputError(
                f"downsample_mode is {mode!r}, the high-res view is encoded with {model.config.downsample_mode!r}; set "
                "model.config.downsample_mode instead of passing it."
            )
        super().check_low_res(model, inputs, grids)
