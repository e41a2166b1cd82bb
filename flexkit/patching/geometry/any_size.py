"""Towers that take images of any size: the high-res view is one larger image, not tiles."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError, UnsupportedModelError
from flexkit.grids import Pair
from flexkit.patching.geometry.base import PREFIX, Declared, Geometry, image_features
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

    @property
    def default_policy(self) -> Policy:
        # Grids differ from image to image: a neighbourhood in cells, not a fixed number of pooled cells.
        return PUBLISHED_THRESHOLD.dilated(1)

    @abstractmethod
    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], prefix: str) -> list[Pair]:
        """``(rows, columns)`` of every image, in pixels or patches.

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
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], zoom: Pair, prefix: str = PREFIX
    ) -> list[Pair]:
        cell = self._cell(model.config)
        sizes = self.sizes(model, inputs, prefix)
        for rows, columns in sizes:
            if rows % (cell * zoom[0]) or columns % (cell * zoom[1]):
                raise HighResInputError(
                    f"{prefix}{self.size_input} has an image of {rows} x {columns}; expected rows divisible by "
                    f"{cell * zoom[0]} and columns by {cell * zoom[1]}: zoom {zoom} times {cell} for each image token."
                )
        return [(rows // cell // zoom[0], columns // cell // zoom[1]) for rows, columns in sizes]

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Pair], zoom: Pair
    ) -> list[Tensor]:
        return image_features(model, **{name: inputs[name] for name in self.inputs})

    def check_low_res(self, model: PreTrainedModel, inputs: Mapping[str, object], grids: Sequence[Pair]) -> None:
        low_res = {name: value for name in self.inputs if isinstance(value := inputs.get(name), Tensor)}
        if len(low_res) != len(self.inputs):
            return
        known: dict[str, int] = {}
        for name, declared in self.declared(model, (1, 1)).items():
            declared.check_axes(name, low_res[name], known)
            if name == self.size_input:
                low_res[name] = declared.checked(name, low_res[name])
        if len(low_res[self.size_input]) != len(grids):
            return
        held = self.grids(model, low_res, (1, 1), prefix="")
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

    def __init__(self, cell: Callable[[Any], int], *, layout: Callable[[Pair], Tensor] | None = None) -> None:
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
        return super().layout(model, grid) if self._layout is None else self._layout(grid)

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Pair], zoom: Pair
    ) -> list[Tensor]:
        # One by one: towers attend across the batch behind a mask, or see the padding.
        features = []
        for pixels, size, (rows, columns) in zip(inputs["pixel_values"], inputs["image_sizes"], grids, strict=True):
            height, width = size.tolist()
            (view,) = image_features(model, pixel_values=pixels[None, :, :height, :width], image_sizes=size[None])
            features.append(view[self.layout(model, (rows * zoom[0], columns * zoom[1])).to(view.device)])
        return features
