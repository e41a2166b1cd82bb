"""Inputs for both views of an image."""

from flexkit.processing.processor import FlexProcessor

__all__ = ["FlexProcessor"]
