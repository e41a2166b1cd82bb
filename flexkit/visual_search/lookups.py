"""What stands under which letter, told in texts: a lookup that takes no picture to be learned."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from flexkit.visual_search.choices import Told, tell
from flexkit.visual_search.data import Chat, Chats, Collator, Turns

__all__ = ["LookupCollator", "Lookups"]

_WITHOUT_PICTURE, _TOLD = 0.75, 4
"""How many batches are lists of options, and how many letters are asked for of each list."""

Lesson = tuple[Chat, ...] | tuple[tuple[Told, ...], ...]
"""A batch of chats, or of lists of options without a picture."""


class Lookups(Dataset[Lesson]):
    """Batches of chats, of two kinds: lists of options without a picture, in three of four batches, and scenes.

    What stands under a letter can be looked up in a text as well as behind a picture, and a text is much shorter: so
    a model comes by it in minutes. The scenes keep what it knows.

    Parameters
    ----------
    scenes : Chats
        For each batch as many as it shows, one batch behind the other.
    batch : int
        How many scenes a batch shows.
    lists : int
        How many lists of options a batch has that shows none.
    """

    def __init__(self, scenes: Chats, batch: int, lists: int) -> None:
        self.scenes, self.batch, self.lists = scenes, batch, lists

    def __len__(self) -> int:
        return len(self.scenes) // self.batch

    def __getitem__(self, index: int) -> Lesson:
        random = np.random.default_rng([self.scenes.seed, index, 2])
        if random.random() < _WITHOUT_PICTURE:
            return tuple(tell(random, _TOLD) for _ in range(self.lists))
        return tuple(self.scenes[self.batch * index + each] for each in range(self.batch))


class LookupCollator:
    """Turn what :class:`Lookups` gives, one at a time, into a batch as of :class:`Collator`.

    Parameters
    ----------
    processor : transformers.ProcessorMixin
        Of the model.
    """

    def __init__(self, processor: Any) -> None:
        self.collator = Collator(processor)

    def __call__(self, lessons: Sequence[Lesson]) -> dict[str, Tensor]:
        images: list[Image | None] = []
        turns: list[Turns] = []
        for chat in (chat for lesson in lessons for chat in lesson):
            images.append(chat.scene.image if isinstance(chat, Chat) else None)
            turns.append(chat.turns if isinstance(chat, Chat) else chat)
        return self.collator.labelled(images, turns)
