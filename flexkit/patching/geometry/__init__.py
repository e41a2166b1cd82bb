"""How families of models lay out their image tokens; one small class per kind of layout."""

from flexkit.patching.geometry.base import Geometry
from flexkit.patching.geometry.dynamic import DynamicGrid
from flexkit.patching.geometry.fixed import FixedGrid
from flexkit.patching.geometry.registry import find_geometry, register_geometry, supported_models

__all__ = ["DynamicGrid", "FixedGrid", "Geometry", "find_geometry", "register_geometry", "supported_models"]
