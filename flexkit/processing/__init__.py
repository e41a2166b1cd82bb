"""Inputs for both views of an image."""

from flexkit.processing.processor import FlexProcessor
from flexkit.processing.resizing import SmallImageWarning

__all__ = ["FlexProcessor", "SmallImageWarning"]
