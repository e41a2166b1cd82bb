"""What the kinds that take patches of an image of any size share."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tests.zoo.family import Family, Finish, Grid, Views, bare, in_one
from tests.zoo.pixels import clip, patches
from tests.zoo.tiny import MROPE, PATCH_TOWER, TEXT, TOKENS, config

__all__ = ["HYBRID", "INTERLEAVED", "grid_family", "square_patches"]

INTERLEAVED: dict[str, Any] = {**MROPE, "mrope_interleaved": True}
"""Rotary positions whose axes take turns in a head's width."""

HYBRID: dict[str, Any] = dict(
    layer_types=["linear_attention", "full_attention"] * 2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
"""Layers of linear attention in between."""


def grid_family(
    name: str,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    *,
    tower: dict[str, Any] = PATCH_TOWER,
    tokens: dict[str, Any] = TOKENS,
    high_res: Views = patches,
    sequence: Callable[[Grid], list[int]] = bare,
    video: Views | None = clip,
    video_sequence: Callable[[Grid], list[int]] = in_one,
    finish: Finish | None = None,
    **settings: Any,
) -> Family:
    """A kind, named by its model type and what it has beside the common sizes."""
    return Family(
        name,
        lambda: config(
            name, text_config={**TEXT, **(text or {})}, vision_config={**tower, **(vision or {})}, **tokens, **settings
        ),
        high_res,
        grid=(2, 3),
        any_grid=True,
        tokens=sequence,
        video=video,
        video_tokens=video_sequence,
        finish=finish,
    )


def square_patches(config: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """Patches that are little pictures, ``(patches, 3, side, side)``, and their number."""
    views = patches(config, grid, zoom)
    side = config.vision_config.patch_size
    return {**views, "pixel_values": views["pixel_values"].reshape(-1, 3, side, side)}
