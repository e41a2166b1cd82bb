"""What a small model reads of clips whose sampled frames miss what it is asked for.

python -m studies.motion.training --seed 0 --output motion/0        # and other seeds
python -m studies.motion.study motion/* --questions 400 --output docs/evidence/motion.json
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

import flexkit
from flexkit.grids import Grid
from flexkit.measuring import count_flops
from flexkit.visual_search import Question, draw_clip, questions
from flexkit.visual_search.clip import SAMPLED
from flexkit.visual_search.evaluation import VISION, Score, score
from flexkit.visual_search.ways import Oracle, Way
from studies.command import study_parser, write
from studies.motion.model import CELLS_READ, CONFIG, ZOOM, ClipProcessor, build_model

BATCH = 8
TRACKS = ("attribute", "low-res")
ALL = "all frames and tokens in the sequence"
SHIPPED = "flexkit in space and time, trained on pictures alone"
VIEWS: dict[str, Grid] = {
    "flexkit in space: the frames that are sampled, larger": (1, *ZOOM[1:]),
    "flexkit in time: frames between them, no larger": (ZOOM[0], 1, 1),
    "flexkit in space and time": ZOOM,
}
POLICIES: dict[str, Any] = {
    f"... ``Frames(1) & TopK({CELLS_READ})``: of the best frame": flexkit.Frames(1) & flexkit.TopK(CELLS_READ),
    f"{CELLS_READ} cells of each frame at random": flexkit.Random(CELLS_READ),
    f"{CELLS_READ} cells of each frame around the object (oracle)": Oracle(CELLS_READ),
    "every high-res token": flexkit.Everything(),
}
"""What takes the place of the policy of the last of the views."""


def ways(folder: Path) -> dict[str, Way]:
    """What was trained, as it looks in each way."""
    trained = flexkit.from_pretrained(folder / "motion", dtype="float32").state_dict()

    def way(zoom: Grid, policy: Any = CONFIG.policy) -> Way:
        model = build_model(CONFIG.replace(zoom=zoom, policy=policy))
        model.load_state_dict(trained)
        return Way(model, ClipProcessor(zoom), oracle=policy if isinstance(policy, Oracle) else None)

    found = {"low-res frames only": way(ZOOM, flexkit.Nothing())}
    found |= {name: way(zoom) for name, zoom in VIEWS.items()}
    found |= {name: way(ZOOM, policy) for name, policy in POLICIES.items()}
    whole = way(ZOOM)
    flexkit.unpatch_model(whole.model)
    found[SHIPPED] = Way(build_model(), ClipProcessor())
    return found | {ALL: Way(whole.model, whole.processor, in_sequence=True)}


class Batch:
    """Questions, each about a clip of its own.

    Parameters
    ----------
    track : str
        Of the questions.
    seed : int
        Of the clips.
    indices : sequence of int
        Which of the seed's clips.
    """

    def __init__(self, track: str, seed: int, indices: Sequence[int]) -> None:
        self.clips = [draw_clip([seed, index]) for index in indices]
        known = [questions(clip, track) for clip in self.clips]
        self.asked: list[Question] = [of[index % len(of)] for of, index in zip(known, indices, strict=True)]
        self._inputs = dict[tuple[Grid, bool], Any]()

    def answers(self, way: Way) -> list[str]:
        """One word for each question."""
        key = way.processor.zoom, way.in_sequence
        if key not in self._inputs:
            texts = [question.text for question in self.asked]
            self._inputs[key] = way.processor(self.clips, texts, in_sequence=way.in_sequence)
        return way.answer(self._inputs[key], self.places)

    @property
    def places(self) -> list[list[tuple[float, float]]]:
        """Where the digits stand, or would, in the frames that are sampled."""
        which = [clip.items.index(question.item) for clip, question in zip(self.clips, self.asked, strict=True)]
        return [
            [clip.at(frame)[index].digit_at for frame in SAMPLED] for clip, index in zip(self.clips, which, strict=True)
        ]


def study(folder: Path, seed: int, count: int, in_sequence: int) -> dict[str, dict[str, float]]:
    """By way of looking: shares of right answers, what is read, and what the language model computes for a question."""
    looking = ways(folder)
    scores: dict[str, dict[str, list[Score]]] = defaultdict(lambda: defaultdict(list))
    parts = [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]
    for track, part in tqdm([*product(TRACKS, parts)], desc=folder.name, unit="batch"):
        batch = Batch(track, seed, part)
        for name, way in looking.items():
            if name != ALL:
                scores[name][track].append(score(way, batch))
    for track, index in tqdm([*product(TRACKS, range(in_sequence))], desc=ALL, unit="question"):
        scores[ALL][track].append(score(looking[ALL], Batch(track, seed, [index])))
    first, found = Batch(TRACKS[0], seed, [0]), dict[str, dict[str, float]]()
    for name, way in looking.items():
        means = {track: Score.mean(each) for track, each in scores[name].items()}
        found[name] = {track: mean.accuracy for track, mean in means.items()}
        found[name] |= {"questions": means[TRACKS[0]].questions, "read": means[TRACKS[0]].selected_fraction}
        found[name]["lm_gflops"] = count_flops(partial(first.answers, way), without=VISION) / 1e9
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the study of some models."""
    parser = study_parser(__doc__)
    parser.add_argument("--in-sequence", type=int, default=20, help="questions with all tokens in the sequence")
    options = parser.parse_args(arguments)
    found = {
        folder.name: study(folder, options.seed, options.questions, options.in_sequence) for folder in options.folders
    }
    write(options.output, {"questions": options.questions, "models": found})


if __name__ == "__main__":
    main()
