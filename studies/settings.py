"""What each setting of a patched model is worth: added projections trained with it, the base frozen.

flexkit train visual-search --stage tower --stage base --seed 1 --output trained/1        # and seeds 2, 3
python -m studies.settings trained/* --output docs/evidence/settings.json
"""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from flexkit.visual_search import load_model
from flexkit.visual_search.evaluation import Batch, Score, score
from flexkit.visual_search.recipe import CONFIG, STAGES
from flexkit.visual_search.training import train
from flexkit.visual_search.ways import Way
from studies.command import study_parser, write

BATCH = 50
TRACKS = ("attribute", "low-res")
SETTINGS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "start_layer=2": {"start_layer": 2},
    "start_layer=3": {"start_layer": 3},
    "zoom=2": {"zoom": 2},
    "zoom=4": {"zoom": 4},
    'select_from="same", start_layer=0': {"select_from": "same", "start_layer": 0},
    'low_res_keys="replace"': {"low_res_keys": "replace"},
}


def study(base: Path, settings: dict[str, Any], seed: int, count: int) -> dict[str, dict[str, float]]:
    """Train the added projections of one base with these settings, and score them."""
    with TemporaryDirectory() as folder:
        trained = Path(folder)
        (trained / "base").symlink_to(base.resolve() / "base")
        log = json.loads((base / "base" / "log.json").read_text())
        added = {"added": STAGES["added"]}
        train(trained, seed=log["seed"] // 10, stages=added, config=CONFIG.replace(**settings), quiet=True)
        way = Way(*load_model("added", weights=trained))
    found = {}
    for track in TRACKS:
        batches = [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]
        mean = Score.mean([score(way, Batch.draw(track, seed, batch)) for batch in batches])
        found[track] = {"accuracy": mean.accuracy, "fraction": mean.selected_fraction}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the study of some bases."""
    parser = study_parser(__doc__)
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="only this one; default: all")
    options = parser.parse_args(arguments)
    found: dict[str, list[Any]] = {}
    trainings = [(name, base) for name in options.setting or SETTINGS for base in options.folders]
    for name, base in tqdm(trainings, unit="training"):
        found.setdefault(name, []).append(study(base, SETTINGS[name], options.seed, options.questions))
        write(options.output, {"questions": options.questions, "settings": found})


if __name__ == "__main__":
    main()
