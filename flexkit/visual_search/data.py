"""Scenes with questions, as a model is trained on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from flexkit.visual_search.choices import Told, instruct, pose, tell
from flexkit.visual_search.model import ZOOM
from flexkit.visual_search.questions import CLOSE_UP, Question, questions
from flexkit.visual_search.scene import SIZE, Scene, draw_close_up, draw_distinct_scene, draw_scene

__all__ = ["Chat", "Chats", "Collator", "LookupCollator", "Lookups", "as_prompt", "overview_and_tiles", "prompts"]


_WITHOUT_PICTURE, _TOLD = 0.75, 4
"""How many batches are lists of options, and how many letters are asked for of each list."""


@dataclass(frozen=True)
class Chat:
    """Several questions about one scene."""

    scene: Scene
    turns: tuple[Question, ...]


class Chats(Dataset[Chat]):
    """Scenes, each with questions drawn by chance, none of them twice.

    Parameters
    ----------
    seed : int
        Of scenes and questions.
    count : int
        How many.
    tracks : mapping of str to float
        How often a question is of each track; how often a scene is seen in a tile alone, for ``"close-up"``.
    turns : int
        How many questions are asked about a scene, as far as there are as many.
    distinct : float
        How often no two items of a scene are of one colour.
    letters : float
        How often a question has options. If ever, words stand behind questions.
    """

    def __init__(
        self,
        seed: int,
        count: int,
        tracks: Mapping[str, float],
        turns: int = 8,
        *,
        distinct: float = 0.0,
        letters: float = 0.0,
    ) -> None:
        self.seed, self.count, self.tracks, self.turns = seed, count, dict(tracks), turns
        self.distinct, self.letters = distinct, letters

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Chat:
        random = np.random.default_rng([self.seed, index, 1])
        tracks = {track: share for track, share in self.tracks.items() if share}
        close_up = random.random() < tracks.get(CLOSE_UP, 0.0) / sum(tracks.values())
        distinct = self.distinct > 0 and random.random() < self.distinct
        if close_up:
            scene, tracks = draw_close_up([self.seed, index], ZOOM, distinct=distinct), {CLOSE_UP: 1.0}
        else:
            scene = (draw_distinct_scene if distinct else draw_scene)([self.seed, index])
            tracks.pop(CLOSE_UP, None)
        left = {track: list(questions(scene, track)) for track in tracks}
        turns: list[Question] = []
        # No question twice: its answer could be copied.
        while left and len(turns) < self.turns:
            shares = np.array([tracks[track] for track in left])
            track = str(random.choice(list(left), p=shares / shares.sum()))
            turns.append(left[track].pop(int(random.integers(len(left[track])))))
            left = {track: asked for track, asked in left.items() if asked}
        if not self.letters:
            return Chat(scene, tuple(turns))
        return Chat(
            scene, tuple((pose if random.random() < self.letters else instruct)(random, turn) for turn in turns)
        )


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


class Collator:
    """Turn chats into a batch, with labels for the answers alone.

    Parameters
    ----------
    processor : FlexProcessor or transformers.ProcessorMixin
        Of the model.
    in_sequence : bool
        Whether the prompt holds all tiles of a scene as images of their own, behind the scene itself.
    """

    def __init__(self, processor: Any, *, in_sequence: bool = False) -> None:
        self.processor, self.in_sequence = processor, in_sequence

    def __call__(self, chats: Sequence[Chat]) -> dict[str, Tensor]:
        return self.labelled([chat.scene.image for chat in chats], [chat.turns for chat in chats])

    def labelled(self, images: Sequence[Image | None], chats: Sequence[Sequence[Question | Told]]) -> dict[str, Tensor]:
        """A batch of questions in a row.

        Parameters
        ----------
        images : sequence of PIL.Image.Image or None
            What they are about; none where there is nothing to see.
        chats : sequence of sequence of Question or Told
            As many rows of them.
        """
        texts = [" ".join(f"{turn.text} {turn.answer}</s>" for turn in turns) for turns in chats]
        inputs = prompts(self.processor, images, texts, in_sequence=self.in_sequence)
        ids = inputs["input_ids"]
        labels = torch.full_like(ids, -100)
        for index, turns in enumerate(chats):
            ends = (ids[index] == self.processor.tokenizer.eos_token_id).nonzero()[:, 0].tolist()
            for end, turn in zip(ends, turns, strict=True):
                said = slice(end - len(turn.answer.split()), end + 1)
                labels[index, said] = ids[index, said]
        return {**inputs, "labels": labels}


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
        turns: list[Sequence[Question | Told]] = []
        for chat in (chat for lesson in lessons for chat in lesson):
            images.append(chat.scene.image if isinstance(chat, Chat) else None)
            turns.append(chat.turns if isinstance(chat, Chat) else chat)
        return self.collator.labelled(images, turns)


def prompts(
    processor: Any,
    images: Sequence[Image | None],
    texts: Sequence[str],
    *,
    in_sequence: bool = False,
    bare: bool = False,
) -> Any:
    """What a model is given of pictures and texts.

    Parameters
    ----------
    processor : FlexProcessor or transformers.ProcessorMixin
        Of the model.
    images : sequence of PIL.Image.Image or None
        As many as texts; none where there is nothing to see.
    texts : sequence of str
        What stands behind the image.
    in_sequence : bool
        As for :class:`Collator`.
    bare : bool
        As for :func:`as_prompt`.
    """
    shown = [_views(image, in_sequence) for image in images]
    marked = [as_prompt(processor, text, len(views), bare=bare) for views, text in zip(shown, texts, strict=True)]
    return processor(images=shown if any(shown) else None, text=marked, padding=True, return_tensors="pt")


def _views(image: Image | None, in_sequence: bool) -> list[Image]:
    if image is None:
        return []
    return overview_and_tiles(image) if in_sequence else [image]


def as_prompt(processor: Any, text: str, images: int = 1, *, bare: bool = False) -> str:
    """A text behind one or several images, as the chat template of a processor puts it.

    Parameters
    ----------
    processor : FlexProcessor or transformers.ProcessorMixin
        Of the model.
    text : str
        What stands behind the images.
    images : int
        How many.
    bare : bool
        Whether nothing stands behind the text that asks for an answer.
    """
    content = [*[{"type": "image"}] * images, {"type": "text", "text": text}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=not bare))


def overview_and_tiles(image: Image) -> list[Image]:
    """A picture and its nine tiles, in raster order."""
    whole = image.resize((SIZE, SIZE))
    side = SIZE // ZOOM
    corners = [(x * side, y * side) for y in range(ZOOM) for x in range(ZOOM)]
    return [image, *(whole.crop((x, y, x + side, y + side)) for x, y in corners)]
