"""From the small model that ships, which has seen pictures alone, to one that reads clips.

python -m studies.motion.training --seed 0 --output motion/0
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from flexkit.training.processes import alone
from flexkit.visual_search import Clip, Question, draw_clip
from flexkit.visual_search.data import answer_labels, draw_turns, transcript
from flexkit.visual_search.recipe import Stage
from flexkit.visual_search.running import Budgets, Run
from studies.motion.model import ClipProcessor, build_model

STAGE = Stage(400, 4, 2e-3, {"attribute": 1.0, "low-res": 1.0}, budgets=(2, 2, 2, 4, 8), save_steps=50)
TURNS = 8
"""How many questions are asked about a clip."""


class Chats(Dataset[tuple[Clip, tuple[Question, ...]]]):
    """Clips, each with questions drawn by chance, none of them twice."""

    def __init__(self, seed: int, stage: Stage) -> None:
        self.seed, self.stage = seed, stage

    def __len__(self) -> int:
        return self.stage.steps * self.stage.batch

    def __getitem__(self, index: int) -> tuple[Clip, tuple[Question, ...]]:
        random = np.random.default_rng([self.seed, index, 1])
        clip = draw_clip([self.seed, index])
        return clip, draw_turns(random, clip, self.stage.tracks, TURNS)


class Collator:
    """Turn them into a batch, with labels for the answers alone."""

    def __init__(self) -> None:
        self.processor = ClipProcessor()

    def __call__(self, chats: Sequence[tuple[Clip, tuple[Question, ...]]]) -> dict[str, Any]:
        inputs = self.processor([clip for clip, _ in chats], [transcript(turns) for _, turns in chats])
        return {
            **inputs,
            "labels": answer_labels(self.processor.tokenizer, inputs["input_ids"], [turns for _, turns in chats]),
        }


def train(folder: Path, seed: int = 0) -> None:
    """Train what a folder lacks; a training that was cut off goes on from its last checkpoint.

    Everything but the tower is trained, by the loss of the answers alone. Tiles are painted and encoded when the model
    looks at them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        run = Run(folder, "motion", STAGE, seed, workers=0, quiet=False)
        if not run.log.exists():
            model = build_model()
            model.model.vision_tower.requires_grad_(False)
            history = run.fit(model, Chats(seed, STAGE), Collator(), Budgets(STAGE.budgets, seed))
            run.finish(model.save_pretrained, history)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    train(options.output, options.seed)


if __name__ == "__main__":
    main()
