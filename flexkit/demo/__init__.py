"""A demo that needs no download: a small model, a scene to ask about, and what an answer costs."""

from flexkit.demo.model import small_llava
from flexkit.demo.scene import Scene, draw_scene

__all__ = ["Scene", "draw_scene", "small_llava"]
