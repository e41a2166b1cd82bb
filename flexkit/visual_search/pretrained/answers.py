"""Scenes with a question each, for a base that says one word and no more."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexkit.visual_search.data import Chat
from flexkit.visual_search.evaluation import Batch
from flexkit.visual_search.pretrained.words import word_id

__all__ = ["AnswerCollator"]


class AnswerCollator:
    """Turn the first questions of chats into a batch, with labels for the answers alone.

    Parameters
    ----------
    processor : FlexProcessor or transformers.ProcessorMixin
        Of the model.
    short : bool
        Whether questions are asked in few words.
    """

    def __init__(self, processor: Any, *, short: bool = False) -> None:
        self.processor, self.short = processor, short

    def __call__(self, chats: Sequence[Chat]) -> dict[str, Tensor]:
        asked = [chat.turns[0] for chat in chats]
        inputs = Batch([chat.scene.image for chat in chats], asked, self.short).inputs(self.processor)
        answers = torch.tensor([[word_id(self.processor.tokenizer, question.answer)] for question in asked])
        ids = torch.cat([inputs["input_ids"], answers], 1)
        seen = torch.cat([inputs["attention_mask"], torch.ones_like(answers)], 1)
        labels = torch.full_like(ids, -100)
        labels[:, -1:] = answers
        return {**inputs, "input_ids": ids, "attention_mask": seen, "labels": labels}
