"""Vision towers that take images of any size as flattened patches: Qwen-VL, GLM-V, ..."""

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from transformers.image_transforms import resize
from transformers.image_utils import to_numpy_array

from flexkit.errors import UnsupportedModelError
from flexkit.zoom import Pair

__all__ = ["grid_view"]


def grid_view(
    image_processor: Any, images: list[Any], low_res: Mapping[str, Any], options: dict[str, Any], zoom: Pair
) -> dict[str, Any]:
    """Resize each image to exactly ``zoom`` times the low-res grid of patches, and cut it into patches.

    Parameters
    ----------
    image_processor : transformers.BaseImageProcessor
        The image processor of the low-res view.
    images : list of numpy.ndarray or torch.Tensor
        The images before any resizing, each ``(channels, height, width)``.
    low_res : dict
        What the image processor made of them: ``pixel_values`` ``(patches, values)`` and ``image_grid_thw``
        ``(images, 3)``.
    options : dict
        The keyword arguments of that call.
    zoom : tuple of int
        Along rows and columns.

    Returns
    -------
    dict
        The outputs of the image processor for the high-res view, prefixed with ``hd_``. The rows and columns
        of ``hd_image_grid_thw`` are exactly ``zoom`` times those of the low-res view.

    Raises
    ------
    UnsupportedModelError
        If the image processor does not keep to that grid.
    """
    settings = ChainMap(options, vars(image_processor))
    rows, columns = zoom
    grids = [[int(t), rows * int(h), columns * int(w)] for t, h, w in low_res["image_grid_thw"]]
    side = settings["patch_size"]
    resized = [
        _resize(image, (side * height, side * width), settings["resample"])
        for image, (_, height, width) in zip(images, grids, strict=True)
    ]
    high_res = image_processor.preprocess(resized, **{**options, "do_resize": False})
    made = [[int(number) for number in grid] for grid in high_res["image_grid_thw"]]
    if made != grids:
        raise UnsupportedModelError(
            f"{type(image_processor).__name__} cut the high-res view into grids {made} where zoom {zoom} "
            f"asks for {grids}: it does not cut an image of patch_size={side} times the grid into that grid."
        )
    names = [name for name in image_processor.model_input_names if name in high_res]
    return {f"hd_{name}": high_res[name] for name in names}


def _resize(image: Any, size: Pair, resample: Any) -> Any:
    pil_filter = resample if isinstance(resample, int) else None
    return resize(to_numpy_array(image), size, pil_filter, input_data_format="channels_first")
