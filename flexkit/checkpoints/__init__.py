"""Weights in and out: what patching added, and the published checkpoints."""

from flexkit.checkpoints.flex import load_flex, save_flex
from flexkit.checkpoints.llava import load_llava_flexattn

__all__ = ["load_flex", "load_llava_flexattn", "save_flex"]
