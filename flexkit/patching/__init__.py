"""Patching Hugging Face models: a second view for a model that exists."""

from flexkit.patching.config import FlexConfig
from flexkit.patching.drift import FeatureDriftWarning
from flexkit.patching.geometry import Geometry
from flexkit.patching.patch import (
    UntrainedProjectionsWarning,
    disabled,
    flex_parameters,
    patch_model,
    set_alpha,
    set_policy,
    unpatch_model,
    using_policy,
)
from flexkit.patching.registry import register_geometry, supported_models
from flexkit.patching.state import added_parameters, get_patch, is_patched

__all__ = [
    "FeatureDriftWarning",
    "FlexConfig",
    "Geometry",
    "UntrainedProjectionsWarning",
    "added_parameters",
    "disabled",
    "flex_parameters",
    "get_patch",
    "is_patched",
    "patch_model",
    "register_geometry",
    "set_alpha",
    "set_policy",
    "supported_models",
    "unpatch_model",
    "using_policy",
]
