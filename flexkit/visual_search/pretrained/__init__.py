"""A base on a language model that others have trained on text: deep, as people use them, where the small one is not."""

from flexkit.visual_search.pretrained.weights import load_base

__all__ = ["load_base"]
