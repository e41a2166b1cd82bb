"""What an image processor shows of a picture, by its own arithmetic: what is resized to what, padded and cut off."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import get_size_dict
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import get_image_size_for_max_height_width

from flexkit.encoding import TileSource
from flexkit.encoding.sources import Box
from flexkit.errors import HighResInputError, UnsupportedModelError
from flexkit.grids import Pair

__all__ = ["Framed", "Resized", "canvas_of", "extent_of"]

Colour = tuple[int, ...]
_BLACK: Colour = (0, 0, 0)
_LARGEST = 4096
"""Longest edge that Idefics 3 resizes to, whatever it is told."""


class Framed(TileSource):
    """A picture on a canvas of one colour, which may be smaller than the picture.

    Parameters
    ----------
    source : TileSource
        The picture.
    top, left : int
        Where on the canvas its upper left corner lies; below 0 something is cut off.
    size : tuple of int
        Height and width of the canvas.
    colour : tuple of int
        RGB.
    """

    def __init__(self, source: TileSource, top: int, left: int, size: Pair, colour: Colour = _BLACK) -> None:
        self.source, self.top, self.left, self.colour, self._size = source, top, left, colour, size

    @property
    def size(self) -> Pair:
        return self._size

    def region(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        height, width = self.source.size
        rows = max(0, top - self.top), min(height, bottom - self.top)
        columns = max(0, left - self.left), min(width, right - self.left)
        canvas = np.empty((bottom - top, right - left, 3), np.uint8)
        canvas[:] = self.colour
        if rows[0] < rows[1] and columns[0] < columns[1]:
            y, x = rows[0] + self.top - top, columns[0] + self.left - left
            inside = self.source._pixels(rows[0], columns[0], rows[1], columns[1])
            canvas[y : y + rows[1] - rows[0], x : x + columns[1] - columns[0]] = inside
        return canvas


class Resized(TileSource):
    """A picture in another size, of which only the parts that are looked at are ever made.

    Parameters
    ----------
    source : TileSource
        The picture.
    size : tuple of int
        Height and width.
    resample : int
        A filter of PIL.
    """

    def __init__(self, source: TileSource, size: Pair, resample: int) -> None:
        self.source, self.resample, self._size = source, resample, size

    @property
    def size(self) -> Pair:
        return self._size

    def region(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        (height, width), (rows, columns) = self.source.size, self.size
        box = left * width / columns, top * height / rows, right * width / columns, bottom * height / rows
        return np.asarray(self.source.read(box, (bottom - top, right - left), self.resample))


def canvas_of(
    image_processor: Any, source: TileSource, settings: Mapping[str, Any], name: str = "pixel_values"
) -> TileSource:
    """What an image processor makes of a picture before it scales the colours, read only where it is looked at.

    Parameters
    ----------
    image_processor : transformers.BaseImageProcessor
        One that makes pictures of one size.
    source : TileSource
        The picture.
    settings : mapping
        Of the image processor and the call.
    name : str
        Which of its outputs.

    Raises
    ------
    UnsupportedModelError
        If what is shown depends on what is in the picture, or sizes are given in a way that is not known.
    """
    if hasattr(image_processor, "downsampler_stride"):  # Step 3, whose pictures are stretched before it gets them
        source = _resized(source, _lengths(image_processor, settings, "size"), settings)
    place = next((kind for mark, kind in _KINDS.items() if hasattr(image_processor, mark)), _plain)
    return place(image_processor, source, settings, name)


def extent_of(canvas: TileSource, source: TileSource) -> tuple[Box, Colour]:
    """Where the edges of a canvas lie in pixels of the picture that is on it, and the colour of what is beside that."""
    colour = _BLACK
    left, top, right, bottom = 0.0, 0.0, float(canvas.size[1]), float(canvas.size[0])
    while isinstance(canvas, Framed | Resized) and canvas is not source:
        if isinstance(canvas, Framed):
            left, right, top, bottom = left - canvas.left, right - canvas.left, top - canvas.top, bottom - canvas.top
            colour = canvas.colour
        else:
            down, across = (own / made for own, made in zip(canvas.source.size, canvas.size, strict=True))
            left, right, top, bottom = left * across, right * across, top * down, bottom * down
        canvas = canvas.source
    return (left, top, right, bottom), colour


def _plain(image_processor: Any, source: TileSource, settings: Mapping[str, Any], name: str) -> TileSource:
    """Resized, then cut to its centre."""
    if settings.get("do_pad") and hasattr(image_processor, "pad_to_square"):  # LLaVA
        mean = settings.get("image_mean")
        source = _squared(source, tuple(int(share * 255) for share in mean) if mean else _BLACK)
    if settings.get("do_resize", True):
        source = _resized(source, _lengths(image_processor, settings, "size"), settings)
    if not settings.get("do_center_crop"):
        return source
    crop = _lengths(image_processor, settings, "crop_size")
    return _centred(source, (crop["height"], crop["width"]), isinstance(image_processor, TorchvisionBackend))


def _stretched(image_processor: Any, source: TileSource, settings: Mapping[str, Any], name: str) -> TileSource:
    """LLaVA-NeXT and LLaVA-OneVision: the overview is stretched, and the rest is as if it were an image."""
    size = _lengths(image_processor, settings, "size")
    side = size.get("shortest_edge")
    stretched = {"height": side, "width": side} if side else size
    return _plain(image_processor, _resized(source, stretched, settings), {**settings, "do_pad": False}, name)


def _longest(image_processor: Any, source: TileSource, settings: Mapping[str, Any], name: str) -> TileSource:
    """DeepSeek-VL, Janus: the longer edge fits, and the rest is padded; the hybrid's second is made of its first."""
    if name != "high_res_pixel_values" and hasattr(image_processor, "high_res_size"):
        source = _longest(image_processor, source, settings, "high_res_pixel_values")
    prefix = "high_res_" if name == "high_res_pixel_values" else ""
    if settings.get("do_resize", True):
        side = _lengths(image_processor, settings, f"{prefix}size")["height"]
        scale = side / max(source.size)
        height, width = (max(round(length * scale), settings["min_size"]) for length in source.size)
        source = _resized(source, {"height": height, "width": width}, settings, f"{prefix}resample")
    if not settings.get("do_pad", True):
        return source
    return _squared(source, getattr(image_processor, f"{prefix}background_color"))


def _ocr(image_processor: Any, source: TileSource, settings: Mapping[str, Any], name: str) -> TileSource:
    """DeepSeek-OCR 2, Unlimited-OCR: the longer edge fits, and the rest is padded, or small ones are stretched."""
    side = settings["tile_size"]
    if "maximum_pad_value" in settings:
        side = max(_lengths(image_processor, settings, "size").values())
        if side <= settings["maximum_pad_value"]:
            return _resized(source, {"height": side, "width": side}, settings)
    scale = side / max(source.size)
    height, width = (round(length * scale) for length in source.size)
    source = _resized(source, {"height": height, "width": width}, settings)
    return _squared(source, tuple(settings.get("background_color") or image_processor.background_color))


def _fitted(image_processor: Any, source: TileSource, settings: Mapping[str, Any], name: str) -> TileSource:
    """Mllama, Llama 4: as large as the tile allows, in its upper left corner."""
    size = _lengths(image_processor, settings, "size")
    tile = size["height"], size["width"]
    (height, width), (down, across) = tile, (made / own for made, own in zip(tile, source.size, strict=True))
    if across < down:
        height = min(int(source.size[0] * across) or 1, height)
    else:
        width = min(int(source.size[1] * down) or 1, width)
    return Framed(_resized(source, {"height": height, "width": width}, settings), 0, 0, tile)


def _thumbnail(image_processor: Any, source: TileSource, settings: Mapping[str, Any], name: str) -> TileSource:
    """Donut: the shorter edge fits, then what is too long is shrunk, and the rest is padded."""
    size = _lengths(image_processor, settings, "size")
    target = size["height"], size["width"]
    if settings.get("do_resize", True):
        source = _resized(source, {"shortest_edge": min(target)}, settings)
    height, width = (min(pair) for pair in zip(source.size, target, strict=True))
    if settings.get("do_thumbnail", True) and (height, width) != source.size:
        if source.size[0] > source.size[1]:
            width = int(source.size[1] * height / source.size[0])
        elif source.size[1] > source.size[0]:
            height = int(source.size[0] * width / source.size[1])
        source = _resized(source, {"height": height, "width": width}, settings)
    return _centred(source, target, True) if settings.get("do_pad") else source


def _twice(image_processor: Any, source: TileSource, settings: Mapping[str, Any], name: str) -> TileSource:
    """Idefics 3, SmolVLM: resized by its longer edge to an even number, and that to a square."""
    if settings.get("do_resize", True):
        size = _lengths(image_processor, settings, "size")
        edge = size.get("longest_edge")
        source = _resized(source, size if edge is None else _even(source.size, edge), settings)
    side = _lengths(image_processor, settings, "max_image_size")["longest_edge"]
    return _resized(source, {"height": side, "width": side}, settings)


def _even(size: Pair, edge: int) -> dict[str, int]:
    height, width = _by_longest(size, edge)
    if size[1] >= size[0]:
        height = max(height + height % 2, 1)
    else:
        width = max(width + width % 2, 1)
    if max(height, width) > _LARGEST:
        height, width = _by_longest((height, width), _LARGEST)
    return {"height": max(height, 1), "width": max(width, 1)}


def _by_longest(size: Pair, edge: int) -> Pair:
    ratio = size[1] / size[0]
    return (int(edge / ratio), edge) if size[1] >= size[0] else (edge, int(edge * ratio))


def _vanilla(image_processor: Any, source: TileSource, settings: Mapping[str, Any], name: str) -> TileSource:
    """Perception LM: stretched to one tile."""
    side = settings["tile_size"]
    return _resized(source, {"height": side, "width": side}, settings)


def _resized(
    source: TileSource, lengths: Mapping[str, int], settings: Mapping[str, Any], resample: str = "resample"
) -> TileSource:
    size = _size(lengths, source.size)
    if 0 in size:
        raise HighResInputError(
            f"a picture of {source.size[0]} x {source.size[1]} pixels is too thin: resized by {dict(lengths)} it would "
            "have no pixels. Pad or stretch it."
        )
    return source if size == source.size else Resized(source, size, _filter(settings.get(resample)))


def _size(lengths: Mapping[str, int], given: Pair) -> Pair:
    """The height and width that pictures are resized to, rounded as image processors do."""
    if {"shortest_edge", "longest_edge"} <= lengths.keys():
        height, width = get_size_with_aspect_ratio(given, lengths["shortest_edge"], lengths["longest_edge"])
    elif "shortest_edge" in lengths:
        short, long = lengths["shortest_edge"], int(lengths["shortest_edge"] * max(given) / min(given))
        height, width = (long, short) if given[1] <= given[0] else (short, long)
    elif {"max_height", "max_width"} <= lengths.keys():
        height, width = get_image_size_for_max_height_width(given, lengths["max_height"], lengths["max_width"])
    elif {"height", "width"} <= lengths.keys():
        height, width = lengths["height"], lengths["width"]
    else:
        raise UnsupportedModelError(
            f"sizes of {dict(lengths)} are none that flexkit can read tiles of: give PIL images."
        )
    return height, width


def _lengths(image_processor: Any, settings: Mapping[str, Any], name: str) -> dict[str, int]:
    """What counts pixels in a setting, by name."""
    value, square = settings[name], name != "size" or getattr(image_processor, "default_to_square", True)
    if isinstance(value, int | list | tuple):
        value = get_size_dict(value, default_to_square=square)
    return {key: length for key, length in dict(value).items() if length}


def _filter(resample: Any) -> int:
    if isinstance(resample, int):
        return resample
    mode = str(getattr(resample, "value", "bilinear")).upper()  # torchvision has its own enumeration
    return Image.Resampling[mode] if mode in Image.Resampling.__members__ else Image.Resampling.BILINEAR


def _squared(source: TileSource, colour: Colour) -> TileSource:
    side = max(source.size)
    return source if min(source.size) == side else _centred(source, (side, side), True, colour)


def _centred(source: TileSource, size: Pair, behind: bool, colour: Colour = _BLACK) -> TileSource:
    """A picture in the middle; of an odd number of rows or columns of padding one more is behind it, or before."""
    top, left = (
        (canvas - own) // 2 if behind and canvas > own else -((own - canvas) // 2)
        for canvas, own in zip(size, source.size, strict=True)
    )
    return source if size == source.size else Framed(source, top, left, size, colour)


def _unknown(image_processor: Any, source: TileSource, settings: Mapping[str, Any], name: str) -> TileSource:
    raise UnsupportedModelError(
        f"{type(image_processor).__name__} looks at a picture to decide what to show of it: no tiles can be read one "
        "by one. Give a PIL image instead of a flexkit.TileSource, and set levels to 1."
    )


_Kind = Callable[[Any, TileSource, Mapping[str, Any], str], TileSource]
_KINDS: dict[str, _Kind] = {
    "crop_margin": _unknown,  # PP-FormulaNet looks at the picture to decide
    "image_grid_pinpoints": _stretched,
    "min_size": _longest,
    "background_color": _ocr,
    "resize_to_max_canvas": _fitted,
    "max_image_tiles": _fitted,
    "align_long_axis": _thumbnail,
    "return_row_col_info": _twice,
    "vision_input_type": _vanilla,
}
"""Settings and methods that only one kind of image processor has."""
