"""Flattened patches with their rows and columns: the high-res view is one larger picture."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.grids import Grid, Pair
from flexkit.patching.context.beside import Context, Places
from flexkit.patching.geometry.base import PREFIX, Declared
from flexkit.selection import Policy
from flexkit.selection.threshold import PUBLISHED_THRESHOLD

__all__ = ["FlattenedPatches"]


class FlattenedPatches(Context):
    """Patches ``(images, patches, 2 + width)``; the first two numbers are row and column, from 1; 0 is padding."""

    inputs: ClassVar[tuple[str, ...]] = ("flattened_patches",)
    default_zoom = 2

    @property
    def default_policy(self) -> Policy:
        return PUBLISHED_THRESHOLD.dilated(1)

    def declared(self, model: PreTrainedModel, zoom: Grid) -> Mapping[str, Declared]:
        return {"flattened_patches": Declared(("images", "patches", ...))}

    def grids(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], zoom: Grid, prefix: str = PREFIX
    ) -> list[Pair]:
        grids = []
        for image in inputs["flattened_patches"]:
            places = image[image[:, 0] != 0, :2]
            rows, columns = (int(last) for last in places.amax(0)) if len(places) else (0, 0)
            if not len(places) or rows % zoom[0] or columns % zoom[1] or not _is_raster(places, rows, columns):
                raise HighResInputError(
                    f"{prefix}flattened_patches has an image of {len(places)} patches in {rows} rows and {columns} "
                    f"columns; expected one patch in each, rows divisible by {zoom[0]} and columns by {zoom[1]}."
                )
            grids.append((rows // zoom[0], columns // zoom[1]))
        return grids

    def check_low_res(self, model: PreTrainedModel, inputs: Mapping[str, object], grids: Sequence[Grid]) -> None:
        low: Any = inputs["flattened_patches"]
        self.declared(model, (1, 1))["flattened_patches"].check_axes("flattened_patches", low, {})
        held = self.grids(model, {"flattened_patches": low}, (1, 1), prefix="")
        if held != list(grids):
            raise HighResInputError(f"flattened_patches shows grids {held}; the high-res view is a zoom of {grids}.")

    def places(self, model: PreTrainedModel, inputs: Mapping[str, Any], grids: Sequence[Grid]) -> Places:
        patches = inputs["flattened_patches"]
        return Places(len(patches), list(range(len(patches))), [_raster(image) for image in patches])

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Grid], zoom: Grid
    ) -> list[Tensor]:
        view = inputs["hd_flattened_patches"]
        mask = inputs.get("attention_mask")
        shown = {"flattened_patches": view}
        if mask is not None and "input_ids" not in inputs:  # of the patches, not of a text
            shown["attention_mask"] = view[..., 0].ne(0).to(mask.dtype)
        states = self.route.show(model, inputs, len(view), **shown)
        return [image[_raster(patches)] for image, patches in zip(states, view, strict=True)]


def _is_raster(places: Tensor, rows: int, columns: int) -> bool:
    """Whether these are row and column, from 1, of every cell of a grid, in any order."""
    whole = places.long()
    if len(places) != rows * columns or not torch.equal(whole.to(places.dtype), places) or bool((whole < 1).any()):
        return False
    order = (whole[:, 0] - 1) * columns + whole[:, 1] - 1
    return torch.equal(order.sort().values, torch.arange(rows * columns, device=order.device))


def _raster(patches: Tensor) -> Tensor:
    """Indices of the patches of an image, row by row."""
    rows, columns = patches[:, :2].long().unbind(-1)
    order = (rows * (columns.max() + 1) + columns).argsort(stable=True)
    return order[int((rows == 0).sum()) :]
