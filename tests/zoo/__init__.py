"""Tiny models with random weights, one for each structure that flexkit must cope with, and prompts for them."""

from tests.zoo.family import END, IMAGE, PAD, START, VIDEO, VOCABULARY, Family, Grid
from tests.zoo.few import FEW
from tests.zoo.prompts import Row, low_res, prompt
from tests.zoo.tiny import TEXT, VISION

__all__ = [
    "END",
    "FAMILIES",
    "IMAGE",
    "MAIN",
    "PAD",
    "START",
    "TEXT",
    "VIDEO",
    "VISION",
    "VOCABULARY",
    "Family",
    "Grid",
    "Row",
    "low_res",
    "prompt",
]

FAMILIES = {family.name: family for family in FEW}
"""Those that the laws are tried on in depth."""
MAIN = ("llava", "qwen2_5_vl", "gemma3")
"""Families that differ in structure; the others differ from these in their language model only."""
