"""Towers that take images of any size as patches: in one list, padded lists, a strip, with or without their places."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.grids import Grid, Pair, zoomed
from flexkit.patching.geometry.any_size import SIZES, AnySize, pairs
from flexkit.patching.geometry.base import Declared, Geometry, cells_of_image

__all__ = [
    "BarePatches",
    "DynamicGrid",
    "LinedGrid",
    "ListedPatches",
    "MergedGrid",
    "PaddedPatches",
    "PatchStrip",
    "PositionedPatches",
    "merge_size",
]


def merge_size(config: Any) -> int:
    """Side of a cell in patches, where the tower's config says it."""
    return int(config.vision_config.spatial_merge_size)


class DynamicGrid(AnySize):
    """Patches of all images in one list; some of them, a square, become one cell (Qwen2-VL, GLM-V, Kimi, ...).

    Parameters
    ----------
    cell : callable
        From the model's config to the side of one cell in patches.
    video : Geometry, optional
        How the same models lay out videos.
    """

    inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")
    size_input = "image_grid_thw"

    def __init__(self, cell: Callable[[Any], int] = merge_size, video: Geometry | None = None) -> None:
        super().__init__(cell)
        self.video = video

    def declared(self, model: PreTrainedModel, zoom: Grid) -> Mapping[str, Declared]:
        return {
            self.inputs[0]: Declared(("patches", ...)),
            self.size_input: Declared(("images", 3), "sizes", "(time, rows, columns) each"),
        }

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], prefix: str) -> list[Grid]:
        patches, grids = inputs[self.inputs[0]], [tuple(grid) for grid in inputs[self.size_input].tolist()]
        if sum(math.prod(grid) for grid in grids) != len(patches):
            raise HighResInputError(
                f"{prefix}{self.size_input} {grids} does not add up to the patches of {prefix}{self.inputs[0]}, whose "
                f"shape is {tuple(patches.shape)}."
            )
        if self.axes < len(grids[0]) and any(frames > 1 for frames, _, _ in grids):
            raise HighResInputError(f"{prefix}{self.size_input} is {grids}; expected one frame in time for each image.")
        return [grid[-self.axes :] for grid in grids]

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Grid], zoom: Grid
    ) -> list[Tensor]:
        tokens = torch.cat(super().encode(model, inputs, grids, zoom))
        layouts = [self.layout(model, zoomed(grid, zoom)) for grid in grids]
        images = torch.split(tokens, [len(layout) for layout in layouts])
        return [cells_of_image(image, layout) for image, layout in zip(images, layouts, strict=True)]


class LinedGrid(DynamicGrid):
    """A dynamic grid whose features, and image tokens, have one before the cells, one behind, one after each line."""

    def layout(self, model: PreTrainedModel, grid: Grid) -> Tensor:
        lines = (torch.arange(grid[1] + 1) < grid[1]).repeat(grid[0])
        return torch.nn.functional.pad(lines, (1, 1))


class MergedGrid(DynamicGrid):
    """A dynamic grid that says for each image how many patches a side become one cell (VideoLLaMA 3)."""

    inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw", "image_merge_sizes")

    def __init__(self, video: Geometry | None = None) -> None:
        super().__init__(lambda config: 1, video)

    def declared(self, model: PreTrainedModel, zoom: Grid) -> Mapping[str, Declared]:
        return {
            **super().declared(model, zoom),
            self.inputs[2]: Declared(("images",), "sizes", "one for each image"),
        }

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], prefix: str) -> list[Grid]:
        """``([frames,] rows, columns)`` of every image, in cells."""
        patches, merges = super().sizes(model, inputs, prefix), inputs[self.inputs[2]].tolist()
        divides = [
            not rows % side and not columns % side for (*_, rows, columns), side in zip(patches, merges, strict=False)
        ]
        if len(merges) != len(patches) or not all(divides):
            raise HighResInputError(
                f"{prefix}{self.inputs[2]} is {merges}; expected one number for each image that divides its rows and "
                f"columns, {patches} patches."
            )
        return [
            (*frames, rows // side, columns // side)
            for (*frames, rows, columns), side in zip(patches, merges, strict=True)
        ]


class PaddedPatches(AnySize):
    """Patches ``(images, patches, width)`` padded to the longest, the shape of each image, and a mask (LFM2-VL)."""

    inputs = ("pixel_values", "spatial_shapes", "pixel_attention_mask")
    size_input = "spatial_shapes"

    def declared(self, model: PreTrainedModel, zoom: Grid) -> Mapping[str, Declared]:
        return {
            "pixel_values": Declared(("images", "patches", ...)),
            "spatial_shapes": SIZES,
            "pixel_attention_mask": Declared(("images", "length"), "mask"),
        }

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], prefix: str) -> list[Pair]:
        pixels, mask = inputs["pixel_values"], inputs["pixel_attention_mask"]
        sizes = pairs(inputs["spatial_shapes"])
        counts = [math.prod(size) for size in sizes]
        if pixels.shape[:2] != mask.shape or mask.sum(-1).tolist() != counts:
            raise HighResInputError(
                f"{prefix}spatial_shapes {sizes} asks for {counts} patches; {prefix}pixel_values has shape "
                f"{tuple(pixels.shape)} and {prefix}pixel_attention_mask {tuple(mask.shape)} keeps "
                f"{mask.sum(-1).tolist()}."
            )
        return sizes


class ListedPatches(AnySize):
    """Patches ``(patches, width)`` of all images in one list, and the shape of each image (Nemotron-H Omni)."""

    inputs = ("pixel_values", "image_grid_hw")
    size_input = "image_grid_hw"

    def declared(self, model: PreTrainedModel, zoom: Grid) -> Mapping[str, Declared]:
        return {"pixel_values": Declared(("patches", ...)), "image_grid_hw": SIZES}

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], prefix: str) -> list[Pair]:
        pixels, sizes = inputs["pixel_values"], pairs(inputs["image_grid_hw"])
        if len(pixels) != sum(math.prod(size) for size in sizes):
            raise HighResInputError(
                f"{prefix}image_grid_hw {sizes} does not add up to the patches of {prefix}pixel_values, whose shape is "
                f"{tuple(pixels.shape)}."
            )
        return sizes


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

    def declared(self, model: PreTrainedModel, zoom: Grid) -> Mapping[str, Declared]:
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

    def check_low_res(self, model: PreTrainedModel, inputs: Mapping[str, object], grids: Sequence[Grid]) -> None:
        mode = inputs.get("downsample_mode")
        if mode not in (None, model.config.downsample_mode):
            raise HighResInputError(
                f"downsample_mode is {mode!r}, the high-res view is encoded with {model.config.downsample_mode!r}; set "
                "model.config.downsample_mode instead of passing it."
            )
        super().check_low_res(model, inputs, grids)


class PositionedPatches(AnySize):
    """Patches ``(images, patches, width)`` padded to the longest, with (column, row) of each patch (Gemma 4)."""

    inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_position_ids")
    size_input = "image_position_ids"

    def __init__(self, cell: Callable[[Any], int], video: Geometry | None = None) -> None:
        super().__init__(cell)
        self.video = video

    def declared(self, model: PreTrainedModel, zoom: Grid) -> Mapping[str, Declared]:
        return {
            self.inputs[0]: Declared(("images", "patches", ...)),
            self.size_input: Declared(("images", "places", 2), "integers", "(column, row) of each patch"),
        }

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], prefix: str) -> list[Grid]:
        pixels, places = inputs[self.inputs[0]], inputs[self.size_input]
        if places.shape[1] != pixels.shape[1]:
            raise HighResInputError(
                f"{prefix}{self.inputs[0]} has shape {tuple(pixels.shape)} and {prefix}{self.size_input} "
                f"{tuple(places.shape)}; expected (images, patches, width) and (images, patches, 2)."
            )
        return [_size(f"{prefix}{self.size_input}", image) for image in places]


def _size(name: str, places: Tensor) -> Pair:
    """Rows and columns of patches that lie row by row, in front of padding at (-1, -1)."""
    count = int((places >= 0).all(-1).sum())
    columns, rows = (places.amax(0) + 1).tolist()
    raster = torch.arange(count, device=places.device)
    expected = torch.stack([raster % max(columns, 1), raster // max(columns, 1)], dim=-1)
    if not count or count != rows * columns or not torch.equal(places[:count].long(), expected):
        raise HighResInputError(
            f"{name} has an image of {count} patches in {rows} rows and {columns} columns; expected "
            "(column, row) of every patch, row by row, and (-1, -1) for the padding behind them."
        )
    return rows, columns


class BarePatches(AnySize):
    """Patches of all images in one list, row by row, one for each image token (Fuyu, Inkling).

    Their models take the patches alone; ``image_sizes``, ``(height, width)`` of each image in pixels, comes with the
    high-res view only.
    """

    inputs = ("pixel_values", "image_sizes")
    size_input = "image_sizes"

    def declared(self, model: PreTrainedModel, zoom: Grid) -> Mapping[str, Declared]:
        return {"pixel_values": Declared(("patches", ...)), "image_sizes": SIZES}

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], prefix: str) -> list[Pair]:
        pixels, sizes = inputs["pixel_values"], pairs(inputs["image_sizes"])
        expected = sum(self._patches(model, sizes))
        if len(pixels) != expected:
            raise HighResInputError(
                f"{prefix}image_sizes {sizes} asks for {expected} patches of {self._cell(model.config)} pixels a side; "
                f"{prefix}pixel_values has shape {tuple(pixels.shape)}, expected (patches, ...)."
            )
        return sizes

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Grid], zoom: Grid
    ) -> list[Tensor]:
        features = torch.cat(self.encoded(model, {"pixel_values": inputs["pixel_values"]}))
        return list(torch.split(features, self._patches(model, pairs(inputs["image_sizes"]))))

    def _patches(self, model: PreTrainedModel, sizes: Sequence[Pair]) -> list[int]:
        side = self._cell(model.config)
        return [math.prod(length // side for length in size) for size in sizes]
