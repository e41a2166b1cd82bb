"""Flattened patches with their rows and columns: the high-res view is one larger picture."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.patching.context.geometry import Context, Places
from flexkit.selection import Policy, Threshold
from flexkit.zoom import Pair

__all__ = ["Patches"]


class Patches(Context):
    """Patches ``(images, patches, 2 + width)``; the first two numbers are row and column, from 1; 0 is padding."""

    inputs: ClassVar[tuple[str, ...]] = ("flattened_patches",)
    default_zoom = 2

    @property
    def default_policy(self) -> Policy:
        return Threshold(48 / 255).dilated(1)

    def grids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], zoom: Pair) -> list[Pair]:
        view = inputs["flattened_patches"]
        sizes = [tuple(size) for size in view[..., :2].amax(1).long().tolist()]
        counts = (view[..., 0] > 0).sum(-1).tolist()
        for (rows, columns), patches in zip(sizes, counts, strict=True):
            if rows % zoom[0] or columns % zoom[1] or rows * columns != patches or not patches:
                raise HighResInputError(
                    f"hd_flattened_patches has an image of {patches} patches in {rows} rows and {columns} columns; "
                    f"expected one patch in each, rows divisible by {zoom[0]} and columns by {zoom[1]}."
                )
        return [(rows // zoom[0], columns // zoom[1]) for rows, columns in sizes]

    def check_low_res(self, model: PreTrainedModel, inputs: Mapping[str, object], grids: Sequence[Pair]) -> None:
        low: Any = inputs["flattened_patches"]
        held = self.grids(model, {"flattened_patches": low}, (1, 1))
        if held != list(grids):
            raise HighResInputError(f"flattened_patches shows grids {held}; the high-res view is a zoom of {grids}.")

    def places(self, model: PreTrainedModel, inputs: Mapping[str, Any], grids: Sequence[Pair]) -> Places:
        patches = inputs["flattened_patches"]
        return Places(len(patches), list(range(len(patches))), [_raster(image) for image in patches])

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Pair], zoom: Pair
    ) -> list[Tensor]:
        view = inputs["hd_flattened_patches"]
        mask = inputs.get("attention_mask")
        shown = {"flattened_patches": view}
        if mask is not None and "input_ids" not in inputs:  # of the patches, not of a text
            shown["attention_mask"] = view[..., 0].ne(0).to(mask.dtype)
        states = self.show(model, inputs, len(view), **shown)
        return [image[_raster(patches)] for image, patches in zip(states, view, strict=True)]


def _raster(patches: Tensor) -> Tensor:
    """Indices of the patches of an image, row by row."""
    rows, columns = patches[:, :2].long().unbind(-1)
    order = (rows * (columns.max() + 1) + columns).argsort(stable=True)
    return order[int((rows == 0).sum()) :]
