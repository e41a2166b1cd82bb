"""Which geometry each family of models has: one line a family."""

from typing import Any

from transformers import PreTrainedModel

from flexkit.errors import UnsupportedModelError
from flexkit.patching.geometry.base import Geometry
from flexkit.patching.geometry.dynamic import DynamicGrid
from flexkit.patching.geometry.fixed import FixedGrid

__all__ = ["FAMILIES", "find_geometry"]


def _tower_patches(config: Any) -> int:
    patches = int((config.vision_config.image_size // config.vision_config.patch_size) ** 2)
    keeps_class_token = config.vision_feature_select_strategy == "full" and "clip" in config.vision_config.model_type
    return patches + keeps_class_token


FAMILIES: dict[str, Geometry] = {
    "gemma3": FixedGrid(tokens=lambda config: config.mm_tokens_per_image),
    "llava": FixedGrid(tokens=_tower_patches),
    "qwen2_5_vl": DynamicGrid(),
}


def find_geometry(model: PreTrainedModel) -> Geometry:
    """The geometry of a model's family, checked against the model.

    Raises
    ------
    UnsupportedModelError
        If the family is unknown, or the model lacks what the family should have.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {model_type!r}) cannot be patched: the geometry of its image tokens "
            f"is not known. Known model types: {', '.join(sorted(FAMILIES))}."
        )
    geometry = FAMILIES[model_type]
    geometry.check_model(model)
    return geometry
