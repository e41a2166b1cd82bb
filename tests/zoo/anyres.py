"""LLaVA-NeXT and its relatives: an overview, tiles with a newline token after every row; here the overview alone."""

import math
from functools import partial
from typing import Any

import transformers as tf
from torch import Tensor

from tests.zoo.family import IMAGE, VIDEO, Family, Grid
from tests.zoo.pixels import frames, square
from tests.zoo.tiny import TEXT, VISION, config

__all__ = ["ANYRES", "overview", "with_newline"]


def _llava_next(model_type: str, **settings: Any) -> tf.PreTrainedConfig:
    return config(
        model_type,
        text_config=TEXT,
        vision_config={**VISION, "image_size": 42},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[0, 0]],  # no size for tiles: the overview alone
        **settings,
    )


def overview(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """Tiles of every image, of which there is one, and the size of every image."""
    pixels = square(settings, grid, zoom)["pixel_values"]
    return {"pixel_values": pixels[:, None], "image_sizes": pixels.new_tensor([pixels.shape[-2:]]).long()}


def with_newline(grid: Grid) -> list[int]:
    """No marks around an image, but a newline token behind it."""
    return [IMAGE] * (grid[0] * grid[1] + 1)


def _newline_after_all(grid: Grid) -> list[int]:
    """The cells of all frames, and a newline token."""
    return [VIDEO] * (math.prod(grid) + 1)


def _family(model_type: str, **settings: Any) -> Family:
    tokens = {"video_token_index": VIDEO} if "video" in settings else {}
    make = partial(_llava_next, model_type, **tokens)
    return Family(model_type, make, square, low_res=overview, tokens=with_newline, **settings)


ANYRES = (
    _family("llava_next"),
    _family("llava_next_video", video=frames, video_grid=(2, 1, 1)),
    _family("llava_onevision", video=frames, video_grid=(2, 2, 2), video_tokens=_newline_after_all),
)
