"""Accuracy against how much is read, by what selects it; with intervals over trainings.

flexkit train visual-search --seed 1 --output trained/1        # and seeds 2, 3
python -m studies.selection trained/* --output docs/evidence/selection.json
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import flexkit
from flexkit.visual_search import load_model
from flexkit.visual_search.data import prompts
from flexkit.visual_search.evaluation import draw_questions
from flexkit.visual_search.ways import Oracle, read_fraction

BATCH = 50
CELLS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
THRESHOLDS = (4, 8, 16, 24, 48, 96)
POLICIES: dict[str, Callable[[int], Any]] = {
    "attention map": flexkit.TopK,
    "random": flexkit.Random,
    "centre": flexkit.Center,
    "oracle": Oracle,
}


@torch.no_grad()
def study(folder: Path, stage: str, seed: int, count: int) -> dict[str, dict[str, dict[str, float]]]:
    """By what selects, then by how much it may: accuracy and the fraction that was read."""
    points: dict[tuple[str, str], Any] = {
        (name, str(cells)): policy(cells) for name, policy in POLICIES.items() for cells in CELLS
    }
    points |= {("threshold", f"{value}/255"): flexkit.Threshold(value / 255) for value in THRESHOLDS}
    sums = {point: torch.zeros(2, dtype=torch.float64) for point in points}
    for first in tqdm(range(0, count, BATCH), desc=str(folder), unit="batch"):
        scenes, asked = draw_questions("attribute", seed, range(first, min(first + BATCH, count)))
        inputs = None
        for point, policy in points.items():
            model, processor = load_model(stage, weights=folder, policy=policy)
            if inputs is None:
                texts = [f" {question.text}" for question in asked]
                inputs = prompts(processor, [scene.image for scene in scenes], texts)
            if isinstance(policy, Oracle):
                policy.places = [question.item.digit_at for question in asked]
            with flexkit.trace(model) as trace:
                tokens = model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
            words = processor.tokenizer.convert_ids_to_tokens(tokens)
            right = sum(word == question.answer for word, question in zip(words, asked, strict=True))
            sums[point] += torch.tensor([right, read_fraction(model, trace) * len(asked)])
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (name, amount), (right, read) in sums.items():
        found.setdefault(name, {})[amount] = {"accuracy": float(right) / count, "fraction": float(read) / count}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the study of some trained models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", nargs="+", type=Path, help="folders that `flexkit train` wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stage", default="tuned")
    parser.add_argument("--seed", type=int, default=1_000_003, help="of the scenes")
    parser.add_argument("--questions", type=int, default=1000)
    options = parser.parse_args(arguments)
    found = [study(folder, options.stage, options.seed, options.questions) for folder in options.trained]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"stage": options.stage, "questions": options.questions, "trainings": found}
    options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
