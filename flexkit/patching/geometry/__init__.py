"""How families of models lay out their image tokens; one small class per kind of layout."""

from flexkit.patching.geometry.base import Geometry
from flexkit.patching.geometry.dynamic import DynamicGrid
from flexkit.patching.geometry.families import FAMILIES, find_geometry
from flexkit.patching.geometry.fixed import FixedGrid

__all__ = ["FAMILIES", "DynamicGrid", "FixedGrid", "Geometry", "find_geometry"]
