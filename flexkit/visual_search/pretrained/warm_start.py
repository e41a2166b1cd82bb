"""What a projector learns first: to put every token where the words for what it shows are."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexkit.visual_search.labels import CLASSES, UNKNOWN

__all__ = ["WordRegression"]


class WordRegression(nn.Module):
    """The projector of a model, and what tells it where the words for every token are.

    The target of a token is the sum of its words, each as the difference from the mean of all words, divided by the
    root of their number, so that it is as long as a word; plus that mean.

    Parameters
    ----------
    model : transformers.LlavaForConditionalGeneration
        Whose projector is trained.
    word_ids : mapping of str to sequence of int
        The tokens of the words of each class.
    """

    def __init__(self, model: Any, word_ids: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.tower = model.model.vision_tower.requires_grad_(False)
        self.projector = model.model.multi_modal_projector
        words = model.get_input_embeddings().weight.detach()
        self.mean: Tensor
        self.register_buffer("mean", words.mean(0), persistent=False)
        self.register_buffer("scale", words.square().mean(), persistent=False)
        for name in CLASSES:
            self.register_buffer(name, words[list(word_ids[name])] - self.mean, persistent=False)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss, and what the projector makes of every token.

        Parameters
        ----------
        pixel_values : torch.Tensor
            ``(images, 3, height, width)``.
        labels : torch.Tensor
            ``(images, 5, tokens)``, as :class:`~flexkit.visual_search.dense.DenseScenes` gives them.
        """
        found = self.projector(self.tower(pixel_values, output_hidden_states=True).hidden_states[-1])
        told = labels != UNKNOWN
        words = [
            self.get_buffer(name)[labels[:, index].clamp_min(0)] * told[:, index, :, None]
            for index, name in enumerate(CLASSES)
        ]
        target = self.mean + torch.stack(words).sum(0) / told.sum(1).clamp_min(1).sqrt()[..., None]
        known = told.any(1)
        return {"loss": (found - target)[known].square().mean() / self.scale, "features": found}
