"""Towers that take images of any size, given as flattened patches and a grid."""

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError, UnsupportedModelError
from flexkit.patching.geometry.base import Geometry
from flexkit.patching.geometry.features import image_features
from flexkit.selection import Policy, Threshold
from flexkit.zoom import Pair

__all__ = ["DynamicGrid"]


class DynamicGrid(Geometry):
    """Patches of every image in one list, with (time, rows, columns) of each (Qwen2-VL and its relatives).

    The tower takes any size, so the high-res view is one larger image, not tiles.
    """

    inputs = ("pixel_values", "image_grid_thw")
    default_zoom = 2

    @property
    def default_policy(self) -> Policy:
        # Grids differ from image to image: a neighbourhood in cells, not a fixed number of pooled cells.
        return Threshold(48 / 255).dilated(1)

    def check_model(self, model: PreTrainedModel) -> None:
        if not hasattr(getattr(model.config, "vision_config", None), "spatial_merge_size"):
            raise UnsupportedModelError(f"{type(model).__name__} has no `config.vision_config.spatial_merge_size`.")

    def grids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], zoom: Pair) -> list[Pair]:
        patches, grids = inputs["pixel_values"], inputs["image_grid_thw"]
        merge: int = model.config.vision_config.spatial_merge_size
        if grids.ndim != 2 or grids.shape[-1] != 3 or grids.is_floating_point() or bool((grids < 1).any()):
            raise HighResInputError(
                f"hd_image_grid_thw is {grids.tolist()}; expected positive integers, (time, rows, columns) each."
            )
        if patches.ndim != 2 or int(grids.prod(-1).sum()) != len(patches):
            raise HighResInputError(
                f"hd_image_grid_thw {grids.tolist()} does not add up to the patches of hd_pixel_values, whose shape is "
                f"{tuple(patches.shape)}."
            )
        low_res = []
        for time, rows, columns in grids.tolist():
            if time != 1 or rows % (merge * zoom[0]) or columns % (merge * zoom[1]):
                raise HighResInputError(
                    f"hd_image_grid_thw has ({time}, {rows}, {columns}) patches; expected one frame, rows divisible by "
                    f"{merge * zoom[0]} and columns by {merge * zoom[1]}: zoom {zoom} times {merge} merged patches."
                )
            low_res.append((rows // merge // zoom[0], columns // merge // zoom[1]))
        return low_res

    def check_low_res(self, model: PreTrainedModel, inputs: Mapping[str, object], grids: Sequence[Pair]) -> None:
        low_res = inputs.get("image_grid_thw")
        if not isinstance(low_res, Tensor) or len(low_res) != len(grids):
            return
        merge: int = model.config.vision_config.spatial_merge_size
        held = [(rows // merge, columns // merge) for _, rows, columns in low_res.tolist()]
        if held != list(grids):
            raise HighResInputError(
                f"image_grid_thw gives low-res grids {held}; hd_image_grid_thw is a zoom of {list(grids)}."
            )

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Pair], zoom: Pair
    ) -> list[Tensor]:
        return image_features(model, **{name: inputs[name] for name in self.inputs})
