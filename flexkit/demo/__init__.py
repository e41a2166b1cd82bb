"""A demo that needs no download: a small model, a scene to ask about, and what an answer costs."""

from flexkit.demo.model import small_llava

__all__ = ["small_llava"]
