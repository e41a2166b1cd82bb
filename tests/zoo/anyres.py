"""LLaVA-NeXT and its relatives: an overview, tiles with a newline token after every row; here the overview alone."""

from typing import Any

import transformers as tf
from torch import Tensor

from tests.zoo.family import IMAGE, VIDEO, Family, Grid
from tests.zoo.pixels import square
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


ANYRES = tuple(
    Family(model_type, make, square, low_res=overview, tokens=with_newline)
    for model_type, make in {
        "llava_next": lambda: _llava_next("llava_next"),
        "llava_next_video": lambda: _llava_next("llava_next_video", video_token_index=VIDEO),
        "llava_onevision": lambda: _llava_next("llava_onevision", video_token_index=VIDEO),
    }.items()
)
