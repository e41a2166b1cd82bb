"""How families of models lay out their image tokens; one small class per kind of layout."""

import warnings
from importlib import import_module
from typing import Any

from flexkit.patching.geometry.base import Geometry
from flexkit.patching.geometry.fixed_grid import FixedGrid
from flexkit.patching.geometry.patch_lists import DynamicGrid

__all__ = ["DynamicGrid", "FixedGrid", "Geometry"]


def __getattr__(name: str) -> Any:
    if name in ("find_geometry", "register_geometry", "supported_models"):
        warnings.warn(f"{name} is in flexkit.patching.registry now.", DeprecationWarning, stacklevel=2)
        return getattr(import_module("flexkit.patching.registry"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
