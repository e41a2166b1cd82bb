"""Accuracy against how much is read, by what selects it; with intervals over trainings.

flexkit train visual-search --seed 1 --output trained/1        # and seeds 2, 3
python -m studies.selection trained/* --output docs/evidence/selection.json
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import flexkit
from flexkit.visual_search import load_model
from flexkit.visual_search.evaluation import Batch, Score, score
from flexkit.visual_search.ways import Oracle, Way
from studies.command import study_parser, write

BATCH = 50
CELLS = (1, 2, 4, 6, 8, 16, 32, 64)
THRESHOLDS = (4, 16, 48, 96)
POLICIES: dict[str, Callable[[int], Any]] = {
    "attention map": flexkit.TopK,
    "random": flexkit.Random,
    "centre": flexkit.Center,
    "oracle": Oracle,
}


def study(folder: Path, stage: str, seed: int, count: int) -> dict[str, dict[str, dict[str, float]]]:
    """By what selects, then by how much it may: accuracy and the fraction that was read."""
    points: dict[tuple[str, str], Any] = {
        (name, str(cells)): policy(cells) for name, policy in POLICIES.items() for cells in CELLS
    }
    points |= {("threshold", f"{value}/255"): flexkit.Threshold(value / 255) for value in THRESHOLDS}
    model, processor = load_model(stage, weights=folder)
    scores: dict[tuple[str, str], list[Score]] = {point: [] for point in points}
    for first in tqdm(range(0, count, BATCH), desc=str(folder), unit="batch"):
        batch = Batch.draw("attribute", seed, range(first, min(first + BATCH, count)))
        for point, policy in points.items():
            flexkit.set_policy(model, policy)
            way = Way(model, processor, oracle=policy if isinstance(policy, Oracle) else None)
            scores[point].append(score(way, batch))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (name, amount), of in scores.items():
        mean = Score.mean(of)
        found.setdefault(name, {})[amount] = {"accuracy": mean.accuracy, "fraction": mean.selected_fraction}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the study of some trained models."""
    parser = study_parser(__doc__)
    parser.add_argument("--stage", default="tuned")
    options = parser.parse_args(arguments)
    found = [study(folder, options.stage, options.seed, options.questions) for folder in options.folders]
    write(options.output, {"stage": options.stage, "questions": options.questions, "trainings": found})


if __name__ == "__main__":
    main()
