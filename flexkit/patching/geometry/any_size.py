"""Towers that take images of any size: the high-res view is one larger image, not tiles."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError, UnsupportedModelError
from flexkit.grids import Grid, Pair, zoomed
from flexkit.patching.geometry.base import PREFIX, Declared, Geometry, cells_of_image, image_features
from flexkit.patching.seam.packed import together
from flexkit.selection import Policy
from flexkit.selection.threshold import PUBLISHED_THRESHOLD

__all__ = ["SIZES", "AnySize", "SizedImages", "pairs"]

SIZES = Declared(("images", 2), "sizes", "(rows, columns) each")


class AnySize(Geometry):
    """Images whose inputs say how large each is, in pixels or in patches.

    Parameters
    ----------
    cell : callable
        From the model's config to the side of one cell, in the unit of those sizes.
    """

    default_zoom = 2
    size_input: ClassVar[str]
    """The argument that tells the sizes."""

    def __init__(self, cell: Callable[[Any], int]) -> None:
        self._cell = cell

    def cell(self, config: Any) -> Grid:
        """Rows and columns of one cell, in the unit of :meth:`sizes`; of a video with the number of frames in front."""
        side = self._cell(config)
        return side, side

    @property
    def default_policy(self) -> Policy:
        # Grids differ from image to image: a neighbourhood in cells, not a fixed number of pooled cells.
        return PUBLISHED_THRESHOLD.dilated(1)

    @abstractmethod
    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], prefix: str) -> Sequence[Grid]:
        """``(rows, columns)`` of every image, in pixels or patches; of a video with the number of frames in front.

        Raises :class:`~flexkit.errors.HighResInputError` if the inputs contradict one another; ``prefix`` stands before
        their names.
        """

    def check_model(self, model: PreTrainedModel) -> None:
        try:
            self._cell(model.config)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"the config of {type(model).__name__} lacks `{error.name}`, which tells the size of its image tokens."
            ) from error

    def grids(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], zoom: Grid, prefix: str = PREFIX
    ) -> list[Grid]:
        sizes, cell = self.sizes(model, inputs, prefix), self.cell(model.config)
        steps = zoomed(cell, zoom)
        for size in sizes:
            if any(length % step for length, step in zip(size, steps, strict=True)):
                names = ("frames", "rows", "columns")[-self.axes :]
                divisible = " and ".join(f"{name} divisible by {step}" for name, step in zip(names, steps, strict=True))
                raise HighResInputError(
                    f"{prefix}{self.size_input} has {'a video' if self.axes == 3 else 'an image'} of "
                    f"{' x '.join(map(str, size))}; expected {divisible}: zoom {zoom} times {cell} for each token."
                )
        return [tuple(length // step for length, step in zip(size, steps, strict=True)) for size in sizes]

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Grid], zoom: Grid
    ) -> list[Tensor]:
        return self.encoded(model, {name: inputs[name] for name in self.inputs})

    def encoded(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """What the model's method for images, or videos, makes of these inputs: one tensor for all, or one for each."""
        with together():
            return image_features(model, self.features, **inputs)

    def check_low_res(self, model: PreTrainedModel, inputs: Mapping[str, object], grids: Sequence[Grid]) -> None:
        low_res = {name: value for name in self.inputs if isinstance(value := inputs.get(name), Tensor)}
        if len(low_res) != len(self.inputs):
            return
        known, same = dict[str, int](), (1, 1, 1)[-self.axes :]
        for name, declared in self.declared(model, same).items():
            declared.check_axes(name, low_res[name], known)
            if name == self.size_input:
                low_res[name] = declared.checked(name, low_res[name])
        if len(low_res[self.size_input]) != len(grids):
            return
        held = self.grids(model, low_res, same, prefix="")
        if held != list(grids):
            raise HighResInputError(
                f"{self.size_input} gives low-res grids {held}; hd_{self.size_input} is a zoom of {list(grids)}."
            )


def pairs(sizes: Tensor) -> list[Pair]:
    """``(rows, columns)`` of every image from an input ``(images, 2)``."""
    return [(rows, columns) for rows, columns in sizes.tolist()]


class SizedImages(AnySize):
    """Pictures padded to the largest of a batch, with ``(height, width)`` of each (Pixtral towers, Emu3).

    Parameters
    ----------
    cell : callable
        From the model's config to the side of one cell in pixels.
    layout : callable, optional
        From a grid to the mask of the image tokens of one image that are its cells; by default, all are.
    """

    inputs = ("pixel_values", "image_sizes")
    size_input = "image_sizes"

    def __init__(self, cell: Callable[[Any], int], *, layout: Callable[[Grid], Tensor] | None = None) -> None:
        super().__init__(cell)
        self._layout = layout

    def declared(self, model: PreTrainedModel, zoom: Grid) -> Mapping[str, Declared]:
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

    def layout(self, model: PreTrainedModel, grid: Grid) -> Tensor:
        return super().layout(model, grid) if self._layout is None else self._layout(grid)

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Grid], zoom: Grid
    ) -> list[Tensor]:
        # One by one: towers attend across the batch behind a mask, or see the padding.
        features, sizes = [], inputs["image_sizes"]
        each = zip(inputs["pixel_values"], torch.split(sizes, 1), pairs(sizes), grids, strict=True)
        for pixels, size, (height, width), (rows, columns) in each:
            (view,) = image_features(model, pixel_values=pixels[None, :, :height, :width], image_sizes=size)
            features.append(cells_of_image(view, self.layout(model, (rows * zoom[0], columns * zoom[1]))))
        return features
