"""Weights in and out: what patching added, and the published checkpoints."""

from flexkit.checkpoints.base_loads import BaseModelWarning
from flexkit.checkpoints.flex import load_flex, save_flex
from flexkit.checkpoints.llava import load_llava_flexattn
from flexkit.checkpoints.llava_processor import load_llava_flexattn_processor
from flexkit.checkpoints.pretrained import PatchedModel, from_pretrained

__all__ = [
    "BaseModelWarning",
    "PatchedModel",
    "from_pretrained",
    "load_flex",
    "load_llava_flexattn",
    "load_llava_flexattn_processor",
    "save_flex",
]
