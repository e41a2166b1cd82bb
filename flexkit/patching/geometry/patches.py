"""How many tokens a tower of one input size makes of an image."""

import math
import re
from typing import Any

from flexkit.grids import Pair

__all__ = [
    "merged_by_stages",
    "merged_patches",
    "selected_patches",
    "sides",
    "timm_patches",
    "timm_size",
    "tower_patches",
    "vision_size",
]


def sides(size: object) -> Pair | None:
    """Height and width of a size that configs give as one number or as two; None if it is neither."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return size[0], size[1]
    return None


def vision_size(config: Any) -> object:
    """The picture that the tower takes, as most configs state it."""
    return getattr(getattr(config, "vision_config", None), "image_size", None)


def merged_patches(config: Any, merge: int = 1) -> int:
    """Tokens of an image where ``merge`` times ``merge`` patches of the tower become one."""
    return tower_patches(config.vision_config, merge)


def tower_patches(vision: Any, merge: int = 1) -> int:
    """The same, from the config of the tower."""
    image, patch = sides(vision.image_size), sides(vision.patch_size)
    if image is None or patch is None:
        return 0
    return math.prod(math.ceil(length // side / merge) for length, side in zip(image, patch, strict=True))


def selected_patches(config: Any) -> int:
    """Tokens of an image where the config says whether the tower's class token stays (LLaVA and its relatives)."""
    keeps_class_token = config.vision_feature_select_strategy == "full" and "clip" in config.vision_config.model_type
    return merged_patches(config, merged_by_stages(config.vision_config)) + keeps_class_token


def merged_by_stages(vision: Any) -> int:
    """Patches a side that a hierarchical tower makes one token of: it merges two by two between its stages (Swin)."""
    return int(2 ** (len(getattr(vision, "depths", (1,))) - 1))


def timm_size(config: Any) -> object:
    """The picture that a timm tower was made for, if the config says it."""
    return (config.vision_config.model_args or {}).get("img_size")


def timm_patches(config: Any, merge: int = 1) -> int:
    """Tokens of an image where a timm tower's name says how large its patches are."""
    size, named = sides(timm_size(config)), re.search(r"patch(\d+)", config.vision_config.architecture)
    if size is None or named is None:
        return 0
    return math.prod(length // int(named[1]) // merge for length in size)
