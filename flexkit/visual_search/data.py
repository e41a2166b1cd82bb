"""Scenes with questions, as a model is trained on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from flexkit.visual_search.choices import Told, instruct, pose
from flexkit.visual_search.clip import Clip
from flexkit.visual_search.model import ZOOM
from flexkit.visual_search.questions import CLOSE_UP, Question, questions
from flexkit.visual_search.scene import SIZE, Scene, draw_close_up, draw_distinct_scene, draw_scene

__all__ = [
    "Chat",
    "Chats",
    "Collator",
    "answer_labels",
    "as_prompt",
    "draw_turns",
    "overview_and_tiles",
    "prompts",
    "transcript",
]

Turns = Sequence[Question | Told]


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
        turns = draw_turns(random, scene, tracks, self.turns)
        if self.letters:
            turns = tuple((pose if random.random() < self.letters else instruct)(random, turn) for turn in turns)
        return Chat(scene, turns)


def draw_turns(
    random: np.random.Generator, scene: Scene | Clip, tracks: Mapping[str, float], most: int
) -> tuple[Question, ...]:
    """Draw questions about a scene or a clip, none of them twice: its answer could be copied.

    Parameters
    ----------
    random : numpy.random.Generator
        Source of chance.
    scene : Scene or Clip
        What is asked about.
    tracks : mapping of str to float
        How often a question is of each track.
    most : int
        How many are asked, as far as there are as many.
    """
    left = {track: list(questions(scene, track)) for track in tracks}
    turns: list[Question] = []
    while left and len(turns) < most:
        shares = np.array([tracks[track] for track in left])
        track = str(random.choice(list(left), p=shares / shares.sum()))
        turns.append(left[track].pop(int(random.integers(len(left[track])))))
        left = {track: asked for track, asked in left.items() if asked}
    return tuple(turns)


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

    def labelled(self, images: Sequence[Image | None], chats: Sequence[Turns]) -> dict[str, Tensor]:
        """A batch of questions in a row.

        Parameters
        ----------
        images : sequence of PIL.Image.Image or None
            What they are about; none where there is nothing to see.
        chats : sequence of sequence of Question or Told
            As many rows of them.
        """
        texts = [transcript(turns) for turns in chats]
        inputs = prompts(self.processor, images, texts, in_sequence=self.in_sequence)
        return {**inputs, "labels": answer_labels(self.processor.tokenizer, inputs["input_ids"], chats)}


def transcript(turns: Turns) -> str:
    """Questions with their answers, one behind the other, as :func:`answer_labels` reads them."""
    return " ".join(f"{turn.text} {turn.answer}</s>" for turn in turns)


def answer_labels(tokenizer: Any, input_ids: Tensor, chats: Sequence[Turns]) -> Tensor:
    """Labels for the answers of transcripts alone, and for the tokens that end them.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Of the transcripts; each word of an answer is one token.
    input_ids : torch.Tensor
        ``(batch, length)``, int64.
    chats : sequence of sequence of Question or Told
        What was transcribed.

    Returns
    -------
    torch.Tensor
        ``(batch, length)``, int64; -100 elsewhere.
    """
    labels = torch.full_like(input_ids, -100)
    for own, ids, turns in zip(labels, input_ids, chats, strict=True):
        ends = (ids == tokenizer.eos_token_id).nonzero()[:, 0].tolist()
        for end, turn in zip(ends, turns, strict=True):
            said = slice(end - len(turn.answer.split()), end + 1)
            own[said] = ids[said]
    return labels


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
