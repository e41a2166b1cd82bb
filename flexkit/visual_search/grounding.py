"""A loss that tells attention where to look, for what answers alone hardly teach."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from flexkit.visual_search.data import Chat, Collator
from flexkit.visual_search.labels import SHOWN, covered_tokens
from flexkit.visual_search.model import CELLS

__all__ = ["GroundedCollator", "GroundedTrainer", "grounding_loss"]

_TRACK = "conjunction"


class GroundedCollator(Collator):
    """Tells as well where the objects are that it takes colour and shape to name.

    ``cells`` is ``(batch, length, 64)``, bool: at the last word before each answer the image tokens that the object
    covers.
    """

    def __call__(self, chats: Sequence[Chat]) -> dict[str, Tensor]:
        batch = super().__call__(chats)
        labels = batch["labels"]
        answers = (labels != -100) & (labels != self.processor.tokenizer.eos_token_id)
        cells = torch.zeros(*labels.shape, CELLS**2, dtype=torch.bool)
        for index, chat in enumerate(chats):
            for turn, place in zip(chat.turns, answers[index].nonzero()[:, 0].tolist(), strict=True):
                if turn.track == _TRACK:
                    covered = covered_tokens(turn.item.box, CELLS) > SHOWN
                    cells[index, place - 1] = torch.from_numpy(covered.flatten())
        return {**batch, "cells": cells}


class GroundedTrainer(Trainer):
    """A trainer that also tells one layer's attention where the objects are.

    Parameters
    ----------
    *arguments, **settings
        Of :class:`transformers.Trainer`.
    layer : int
        The layer.
    """

    def __init__(self, *arguments: Any, layer: int, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.layer = layer

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **settings: Any) -> Any:
        """The loss of the answers and the :func:`grounding_loss`, whose ``cells`` are among the inputs."""
        cells = inputs.pop("cells")
        loss, outputs = super().compute_loss(
            model, {**inputs, "output_attentions": True}, return_outputs=True, **settings
        )
        is_image = inputs["input_ids"] == self.accelerator.unwrap_model(model).config.image_token_id
        loss = loss + grounding_loss(outputs.attentions[self.layer], is_image, cells)
        return (loss, outputs) if return_outputs else loss


def grounding_loss(attention: Tensor, is_image: Tensor, cells: Tensor) -> Tensor:
    """How little of a map lies on the object: minus the log of that share, on average over the rows that are told.

    Parameters
    ----------
    attention : torch.Tensor
        ``(batch, heads, length, length)``, after the softmax.
    is_image : torch.Tensor
        ``(batch, length)``, bool: as many image tokens in each sequence.
    cells : torch.Tensor
        ``(batch, length, tokens)``, bool: of the image tokens those that a row should look at; nowhere means anywhere.

    Returns
    -------
    torch.Tensor
        ``()``, in nats; 0 if no row is told.
    """
    batch, length = is_image.shape
    maps = attention.sum(1).transpose(1, 2)[is_image].view(batch, -1, length).transpose(1, 2)
    told = cells.any(-1)
    shares = (maps * cells).sum(-1)[told] / maps.sum(-1)[told]
    return -shares.clamp_min(torch.finfo(shares.dtype).tiny).log().sum() / told.sum().clamp_min(1)
