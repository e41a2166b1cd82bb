"""Ways of reading one prompt: a model, its inputs, and the settings of a patched one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from flexkit.encoding import split_tiles
from flexkit.patching import get_patch

__all__ = ["AskedTwice", "Way", "in_sequence", "wait"]


class Way:
    """A model and the inputs of its prompt; a patched one with the settings that this way has."""

    def __init__(self, model: Any, inputs: Mapping[str, Tensor], **settings: Any) -> None:
        self.model, self.inputs = model, inputs
        self.config = get_patch(model).config.replace(**settings) if settings else None
        self.forget()

    @torch.no_grad()
    def prefill(self) -> None:
        """Run the prompt, and keep what the next tokens need."""
        self.settle()
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        self.model(**self.inputs, past_key_values=self.cache, logits_to_keep=1)
        wait(self.model)

    def settle(self) -> None:
        """Give a patched model the settings of this way."""
        if self.config is not None:
            get_patch(self.model).config = self.config

    def forget(self) -> None:
        """Let go of what the prompt before has kept."""
        self.cache = DynamicCache()

    @torch.no_grad()
    def decode(self) -> None:
        """Run one more token."""
        self.settle()
        prompts = self.inputs.get("input_ids", self.inputs.get("inputs_embeds"))
        token = torch.full((len(prompts), 1), 5, device=self.model.device)
        self.model(input_ids=token, past_key_values=self.cache, logits_to_keep=1)
        wait(self.model)


class AskedTwice(Way):
    """A model that is asked once to learn where to look, and again with that part of the picture as the image."""

    def prefill(self) -> None:
        """Run the prompt, and once more: to a language model one image is like another."""
        super().prefill()
        super().prefill()


def wait(model: Any) -> None:
    """Until a GPU has done what it was told."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def in_sequence(model: Any, inputs: Mapping[str, Tensor], zoom: int, words: int) -> dict[str, Tensor]:
    """The prompt with all tokens of both views."""
    tiles = split_tiles(inputs["hd_pixel_values"], zoom).flatten(0, 1)
    views = torch.cat([inputs["pixel_values"], tiles])
    image = torch.cat(list(model.get_image_features(pixel_values=views, return_dict=True).pooler_output))
    text = model.get_input_embeddings()(inputs["input_ids"][0, -words:])
    return {"inputs_embeds": torch.cat([image.to(text.dtype), text])[None]}
