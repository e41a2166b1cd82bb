"""Images and processors that the tests of this folder share."""

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from tests.tiny_processors import (
    IMAGE_PROMPT,
    tiny_gemma3_processor,
    tiny_llava_processor,
    tiny_qwen_processor,
)

PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": tiny_llava_processor,
    "llava padded": lambda: tiny_llava_processor(pad=True),
    "llava siglip": lambda: tiny_llava_processor(siglip=True),
    "gemma3": tiny_gemma3_processor,
    "qwen": tiny_qwen_processor,
}
SIDES = st.integers(1, 90)
ZOOMS = st.tuples(st.integers(1, 3), st.integers(1, 3))


def image_prompt(name: str) -> str:
    return IMAGE_PROMPT[name.split()[0]]


def noise(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(noise(height, width, seed))


def ramps(height: int, width: int) -> Image.Image:
    """The first channel rises from top to bottom, the second one from left to right."""
    rows, columns = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
    return Image.fromarray(np.stack([rows, columns, rows], -1).round().astype(np.uint8))
