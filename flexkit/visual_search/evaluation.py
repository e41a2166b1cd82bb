"""How often each way of looking answers rightly, what it reads and what that costs."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from tqdm import tqdm

import flexkit
from flexkit.measuring import count_flops, time_in_turns
from flexkit.visual_search.data import prompts
from flexkit.visual_search.processes import processes
from flexkit.visual_search.questions import TRACKS, Question, questions
from flexkit.visual_search.scene import SIZE, Scene, draw_scene
from flexkit.visual_search.ways import Way, load_ways, read_fraction
from flexkit.visual_search.weights import READERS, WEIGHTS

__all__ = ["Score", "draw_questions", "evaluate"]

BATCH = 25
"""How many questions are answered at a time."""
_VISION = ("vision_tower", "multi_modal_projector")
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
        Some of ``"attribute"``, ``"conjunction"`` and ``"low-res"``.
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
            found = [(number, _score(ways, _Batch.draw(track, seed, batch, size))) for number, batch in bar]
        by_batch = [each for _, each in sorted(gather_object(found), key=operator.itemgetter(0))]
        if state.is_main_process:
            costs = _costs(ways, _Batch.draw(track, seed, batches[0], size))
            scores[track] = {
                name: {**asdict(Score.mean([each[name] for each in by_batch])), **costs[name]} for name in ways
            }
    return scores if state.is_main_process else None


def draw_questions(
    track: str, seed: int, indices: Sequence[int], size: int = SIZE
) -> tuple[list[Scene], list[Question]]:
    """Draw the scenes of a seed, and a question about each.

    Parameters
    ----------
    track : str
        Of the questions.
    seed : int
        Of the scenes.
    indices : sequence of int
        Which of the seed's scenes.
    size : int
        Side of the pictures in pixels.
    """
    scenes = [draw_scene([seed, index], size) for index in indices]
    known = [questions(scene, track) for scene in scenes]
    return scenes, [of_scene[index % len(of_scene)] for of_scene, index in zip(known, indices, strict=True)]


def _score(ways: Mapping[str, Way], batch: "_Batch") -> dict[str, Score]:
    return {name: _score_one(way, batch) for name, way in ways.items()}


def _score_one(way: Way, batch: "_Batch") -> Score:
    if flexkit.is_patched(way.model):
        with flexkit.trace(way.model) as trace:
            words = batch.answers(way)
        selected = read_fraction(way.model, trace)
    else:
        words, selected = batch.answers(way), float(way.in_sequence)
    right = [word == question.answer for word, question in zip(words, batch.asked, strict=True)]
    return Score(sum(right) / len(right), len(right), selected)


def _costs(ways: Mapping[str, Way], batch: "_Batch") -> dict[str, dict[str, float]]:
    runs = {name: partial(batch.answers, way) for name, way in ways.items()}
    seconds = time_in_turns(runs)
    count = len(batch.asked)
    return {
        name: {
            "lm_gflops": count_flops(run, without=_VISION) / count / 1e9,
            "seconds": seconds[name] / count,
        }
        for name, run in runs.items()
    }


@dataclass(frozen=True)
class _Batch:
    """Questions, each about a scene of its own."""

    images: Sequence[Any]
    asked: Sequence[Question]
    _inputs: dict[tuple[type, bool], Any] = field(default_factory=dict)

    @classmethod
    def draw(cls, track: str, seed: int, indices: Sequence[int], size: int) -> "_Batch":
        scenes, asked = draw_questions(track, seed, indices, size)
        return cls([scene.image for scene in scenes], asked)

    def answers(self, way: Way) -> list[str]:
        key = type(way.processor), way.in_sequence
        if key not in self._inputs:
            texts = [f" {question.text}" for question in self.asked]
            inputs = prompts(way.processor, self.images, texts, in_sequence=way.in_sequence)
            self._inputs[key] = inputs.to(way.model.device)
        return way.answer(self._inputs[key], [question.item.digit_at for question in self.asked])
