"""What vision towers compute, on the meta device."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkit.errors import UnsupportedModelError
from flexkit.grids import Pair
from flexkit.measuring import count_flops
from flexkit.patching.geometry.base import Geometry
from flexkit.patching.geometry.fixed_grid import FixedGrid
from flexkit.patching.geometry.patch_lists import DynamicGrid
from flexkit.patching.geometry.videos import PatchedVideo

__all__ = ["Tower"]


class Tower:
    """The tower of a model without weights, and how many tokens and operations views of a size take.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        On the meta device.
    geometry : Geometry
        Of the model's images, or of its videos; a view is then one frame of the grid.

    Raises
    ------
    UnsupportedModelError
        If flexkit cannot count for towers of this kind.
    """

    def __init__(self, model: PreTrainedModel, geometry: Geometry) -> None:
        self.model, self.geometry = model, geometry
        blocks = getattr(getattr(getattr(model, "model", None), "visual", None), "blocks", None)
        self.size = geometry.tower_size(model) if isinstance(geometry, FixedGrid) else None
        """Height and width of the only picture that the tower takes, in pixels; None if it takes any."""
        of_qwen = type(geometry) in (DynamicGrid, PatchedVideo) and isinstance(blocks, nn.ModuleList)
        if self.size is None and not of_qwen:
            raise UnsupportedModelError(
                f"flexkit counts for towers of one size and for those of the Qwen2-VL kind; {type(model).__name__} has "
                "another."
            )

    @property
    def cuts_frames(self) -> bool:
        """Whether a high-res view is cut into tiles as large as the low-res one."""
        return isinstance(self.geometry, FixedGrid)

    @property
    def encodes_tiles(self) -> bool:
        """Whether tiles, or the frames of a video, are encoded one by one."""
        return self.cuts_frames or self.geometry.whole_frames

    @property
    def side(self) -> int | None:
        """Side of the only picture that the tower takes."""
        return None if self.size is None else self.size[0]

    @property
    def step(self) -> int:
        """What the side of a view must be a multiple of, in pixels."""
        return self.side or _vision(self.model).patch_size * _vision(self.model).spatial_merge_size

    def grid(self, side: int) -> Pair:
        """Rows and columns of the cells of a square view."""
        if isinstance(self.geometry, FixedGrid):
            return self.geometry.grid(self.model)
        return side // self.step, side // self.step

    def frames(self, sampled: int) -> int:
        """Frames of the grid of a video of which so many are sampled; the last one is repeated until it is full."""
        if isinstance(self.geometry, FixedGrid):
            return sampled
        together: int = _vision(self.model).temporal_patch_size
        return -(-sampled // together)

    def flops(self, side: int) -> int:
        """Operations for one square view as one picture."""
        if isinstance(self.geometry, FixedGrid):
            return count_flops(partial(self.geometry.encode_tiles, self.model, self._tiles()))
        return _dynamic_flops(self.model, side)

    def _tiles(self) -> list[Tensor]:
        channels = getattr(_vision(self.model), "num_channels", 3)
        tile = torch.empty(1, channels, *(self.size or ()), dtype=self.model.dtype, device="meta")
        return [tile] * len(self.geometry.inputs)


def _vision(model: PreTrainedModel) -> Any:
    return model.config.vision_config


def _dynamic_flops(model: Any, side: int) -> int:
    """Written out: such towers lay their windows out by the values of the grid, which the meta device does not have."""
    config, visual = _vision(model), model.model.visual
    patches = (side // config.patch_size) ** 2
    cells = patches // config.spatial_merge_size**2
    inside = sum(_weights(part) for part in (visual.patch_embed, *visual.blocks)) * patches
    mergers = [visual.merger, *getattr(visual, "deepstack_merger_list", ())]
    linear = inside + sum(map(_weights, mergers)) * cells
    windowed = getattr(config, "fullatt_block_indexes", None)
    whole = len(visual.blocks) if windowed is None else len(windowed)
    window = getattr(config, "window_size", 0) // config.patch_size
    rows = side // config.patch_size
    sides = [min(window, rows - at) for at in range(0, rows, window)] if window else []
    squares = sum(length**2 for length in sides) ** 2  # a window of h x w patches has (h w)^2 pairs
    pairs = whole * patches**2 + (len(visual.blocks) - whole) * squares
    width = getattr(config, "embed_dim", config.hidden_size)  # Qwen2-VL's hidden_size is the language model's
    return int(2 * linear + 4 * pairs * width)


def _weights(module: nn.Module) -> int:
    """Multiplications for one token."""
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return sum(math.prod(part.weight.shape) for part in module.modules() if isinstance(part, kinds))
