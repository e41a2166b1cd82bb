"""How often each way of looking answers rightly, what it reads and what that costs."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate.utils import gather_object
from PIL.Image import Image
from tqdm import tqdm

import flexkit
from flexkit.measuring import count_flops, time_in_turns
from flexkit.training.processes import processes
from flexkit.visual_search.choices import CHOICES, pose
from flexkit.visual_search.data import prompts
from flexkit.visual_search.model import ZOOM
from flexkit.visual_search.questions import CLOSE_UP, TRACKS, Question, heard, questions
from flexkit.visual_search.scene import SIZE, draw_close_up, draw_scene
from flexkit.visual_search.ways import Place, Way, load_ways, read_fraction
from flexkit.visual_search.weights import READERS, WEIGHTS

__all__ = ["VISION", "Asking", "Batch", "Score", "evaluate", "score"]

BATCH = 25
"""How many questions are answered at a time."""
VISION = ("vision_tower", "multi_modal_projector")
"""What is no part of the language model."""
Scores = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Score:
    """How a way of looking fares on some questions.

    Attributes
    ----------
    accuracy : float
        Share of the questions that are answered rightly.
    questions : int
        How many there were.
    selected_fraction : float
        Share of the high-res tokens that a layer reads, on average.
    """

    accuracy: float
    questions: int
    selected_fraction: float

    @classmethod
    def mean(cls, scores: Sequence["Score"]) -> "Score":
        """Of several batches."""
        total = sum(score.questions for score in scores)

        def mean(name: str) -> float:
            return float(sum(getattr(score, name) * score.questions for score in scores) / total)

        return cls(mean("accuracy"), total, mean("selected_fraction"))


def evaluate(
    seed: int = 0,
    count: int = 500,
    *,
    weights: Path = WEIGHTS,
    tracks: Iterable[str] = tuple(TRACKS),
    size: int = SIZE,
    quiet: bool = False,
) -> Scores | None:
    """Score every way of looking on fresh scenes; each question is about a scene of its own.

    Several processes (``accelerate launch``) share the work; but for the seconds, their scores are the same.

    Parameters
    ----------
    seed : int
        Of scenes and questions.
    count : int
        How many questions of each track.
    weights : pathlib.Path
        A folder that training wrote; by default what flexkit is shipped with.
    tracks : iterable of str
        Some of ``"attribute"``, ``"conjunction"``, ``"low-res"`` and ``"choices"``.
    size : int
        Side of the pictures in pixels.
    quiet : bool
        Without progress bars.

    Returns
    -------
    dict or None
        By track, then by way: the fields of :class:`Score` and, measured on the first batch, for one question,
        ``lm_gflops``: what the language model computes, in 10⁹ operations, all but the vision tower and projector, and
        ``seconds``: of the whole model, the median of three runs in turns. None but in the main process.
    """
    state = processes()
    scores: Scores = {}
    for track in tracks:
        ways = load_ways(weights, READERS[track], str(state.device))
        batches = [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]
        with state.split_between_processes(list(enumerate(batches))) as own:
            bar = tqdm(own, desc=track, unit="batch", disable=quiet or not state.is_main_process)
            found = [(number, _scores(ways, Batch.draw(track, seed, batch, size))) for number, batch in bar]
        by_batch = [each for _, each in sorted(gather_object(found), key=operator.itemgetter(0))]
        if state.is_main_process:
            costs = _costs(ways, Batch.draw(track, seed, batches[0], size))
            scores[track] = {
                name: {**asdict(Score.mean([each[name] for each in by_batch])), **costs[name]} for name in ways
            }
    return scores if state.is_main_process else None


@dataclass(frozen=True)
class Batch:
    """Questions, each about a scene of its own.

    Attributes
    ----------
    images : sequence of PIL.Image.Image
        The scenes.
    asked : sequence of Question
        One about each.
    short : bool
        Whether they are asked in few words, as only bases on pretrained language models have learned: the word that
        names the object is then the last one, as it is for the small model in any case.
    """

    images: Sequence[Image]
    asked: Sequence[Question]
    short: bool = False
    _inputs: dict[tuple[type, bool], Any] = field(default_factory=dict)

    @classmethod
    def draw(cls, track: str, seed: int, indices: Sequence[int], size: int = SIZE, *, short: bool = False) -> "Batch":
        """Draw the scenes of a seed, and a question about each.

        Parameters
        ----------
        track : str
            Of the questions; or ``"close-up"``, where a tile stands for the scene; or ``"choices"``, where those of the
            track ``"attribute"`` have options, drawn by chance.
        seed : int
            Of the scenes.
        indices : sequence of int
            Which of the seed's scenes.
        size : int
            Side of the pictures in pixels; close-ups have theirs.
        short : bool
            Whether they are asked in few words.
        """
        if track == CLOSE_UP:
            scenes = [draw_close_up([seed, index], ZOOM) for index in indices]
        else:
            scenes = [draw_scene([seed, index], size) for index in indices]
        known = [questions(scene, "attribute" if track == CHOICES else track) for scene in scenes]
        asked: list[Question] = [
            of_scene[index % len(of_scene)] for of_scene, index in zip(known, indices, strict=True)
        ]
        if track == CHOICES:
            randoms = [np.random.default_rng([seed, index, 1]) for index in indices]
            asked = [pose(random, question) for random, question in zip(randoms, asked, strict=True)]
        return cls([scene.image for scene in scenes], asked, short)

    @property
    def places(self) -> list[Place]:
        """Where the digits are."""
        return [question.item.digit_at for question in self.asked]

    def inputs(self, processor: Any, *, in_sequence: bool = False) -> Any:
        """What a processor makes of the questions."""
        key = type(processor), in_sequence
        if key not in self._inputs:
            texts = [f" {question.short}" if self.short else question.text for question in self.asked]
            self._inputs[key] = prompts(processor, self.images, texts, in_sequence=in_sequence, bare=self.short)
        return self._inputs[key]

    def answers(self, way: Way) -> list[str]:
        """The last word of each answer."""
        inputs = self.inputs(way.processor, in_sequence=way.in_sequence).to(way.model.device)
        return way.answer(inputs, self.places, len(self.asked[0].answer.split()))


class Asking(Protocol):
    """Questions about anything, and how they are put to a way of looking."""

    @property
    def asked(self) -> Sequence[Question]:
        """What is asked."""

    def answers(self, way: Way) -> list[str]:
        """The last word of each answer."""


def score(way: Way, batch: Asking) -> Score:
    """Score a way of looking.

    Parameters
    ----------
    way : Way
        Of looking.
    batch : Asking
        What is asked.
    """
    if flexkit.is_patched(way.model):
        with flexkit.trace(way.model) as trace:
            words = batch.answers(way)
        selected = read_fraction(way.model, trace)
    else:
        words, selected = batch.answers(way), float(way.in_sequence)
    right = [word == heard(question.answer.split()[-1]) for word, question in zip(words, batch.asked, strict=True)]
    return Score(sum(right) / len(right), len(right), selected)


def _scores(ways: Mapping[str, Way], batch: Batch) -> dict[str, Score]:
    return {name: score(way, batch) for name, way in ways.items()}


def _costs(ways: Mapping[str, Way], batch: Batch) -> dict[str, dict[str, float]]:
    runs = {name: partial(batch.answers, way) for name, way in ways.items()}
    seconds = time_in_turns(runs)
    count = len(batch.asked)
    return {
        name: {
            "lm_gflops": count_flops(run, without=VISION) / count / 1e9,
            "seconds": seconds[name] / count,
        }
        for name, run in runs.items()
    }
