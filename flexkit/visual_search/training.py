"""From nothing to a model that reads what it looks at: the stages of training, each by transformers' Trainer."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, Trainer, set_seed

import flexkit
from flexkit.training import AlphaRamp
from flexkit.training.processes import alone
from flexkit.visual_search.data import Chats, Collator
from flexkit.visual_search.dense import DenseReader, DenseScenes
from flexkit.visual_search.grounding import GroundedCollator, GroundedTrainer
from flexkit.visual_search.lookups import LookupCollator, Lookups
from flexkit.visual_search.model import add_layer, add_letters, build_model, build_processor
from flexkit.visual_search.recipe import CONFIG, STAGES, Stage
from flexkit.visual_search.running import Budgets, Run
from flexkit.visual_search.weights import load_model, trained
from flexkit.writing import writing

__all__ = ["train"]


def train(
    folder: Path,
    *,
    seed: int = 0,
    stages: Mapping[str, Stage] = STAGES,
    layers: int = 4,
    config: flexkit.FlexConfig = CONFIG,
    workers: int = 1,
    quiet: bool = False,
) -> None:
    """Train the stages whose results a folder lacks; a stage that was cut off goes on from its last checkpoint.

    Several processes (``accelerate launch``) share each step's scenes.

    Parameters
    ----------
    folder : pathlib.Path
        Gets a folder for each stage: a model, or what was added to the base, in float16, and ``log.json``.
    seed : int
        Of weights, scenes and questions.
    stages : mapping of str to Stage
        What to train, in this order.
    layers : int
        Of the language model, from the stage ``base`` on; the tower does not depend on it.
    config : FlexConfig
        How patched models select and read.
    workers : int
        Processes that draw scenes; 0 draws in between.
    quiet : bool
        Without progress bars.

    Raises
    ------
    ConfigError
        If the folder cannot be written, or another training writes to it.
    CheckpointError
        If stages that the wanted ones build on are not in it.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        for name, stage in stages.items():
            run = _Run(folder, name, stage, 10 * seed + list(STAGES).index(name), workers, quiet, layers, config)
            if not run.log.exists():
                _TRAINERS[name](run)


@dataclass(frozen=True)
class _Run(Run):
    layers: int
    config: flexkit.FlexConfig

    def chats(self) -> Chats:
        stage = self.stage
        return Chats(self.seed, stage.steps * stage.batch, stage.tracks, letters=stage.letters)

    def save(self, model: Any, processor: Any, history: list[dict[str, float]]) -> None:
        def write(folder: Path) -> None:
            model.half().save_pretrained(folder)
            processor.save_pretrained(folder)

        self.finish(write, history)


def _tower(run: _Run) -> None:
    model, processor = build_model(seed=run.seed), build_processor()
    set_seed(run.seed)  # for the layers that only the reader has
    reader = DenseReader(model)
    scenes = DenseScenes(run.seed, run.stage.steps * run.stage.batch, processor.image_processor)
    run.save(model, processor, run.fit(reader, scenes, DenseScenes.collate))


def _base(run: _Run) -> None:
    config = LlavaConfig.from_pretrained(trained(run.folder, "tower"))
    config.text_config.num_hidden_layers = run.layers
    set_seed(run.seed)  # for the layers that the tower's model lacks
    model, processor = _load(run, "tower", config=config)
    run.save(model, processor, run.fit(model, run.chats(), Collator(processor)))


def _added(run: _Run) -> None:
    model, processor = _load(run, "base")
    flexkit.patch_model(model, run.config, trained=True)
    model.requires_grad_(False)
    for parameter in flexkit.flex_parameters(model):
        parameter.requires_grad_(True)
    history = run.fit(model, run.chats(), Collator(flexkit.FlexProcessor(processor, model)), AlphaRamp())
    run.finish(partial(flexkit.save_flex, model.half()), history)


def _tuned(run: _Run) -> None:
    model, processor = load_model("added", weights=run.folder)
    model.model.vision_tower.requires_grad_(False)
    budgets = [Budgets(run.stage.budgets, run.seed)] if run.stage.budgets else []
    run.save(model, processor.processor, run.fit(model, run.chats(), Collator(processor), *budgets))


def _in_sequence(run: _Run) -> None:
    model, processor = _load(run, "base")
    run.save(model, processor, run.fit(model, run.chats(), Collator(processor, in_sequence=True)))


def _grounded(run: _Run) -> None:
    model, processor = _load(run, "base", **_WITH_WEIGHTS)
    run.save(model, processor, run.fit(model, run.chats(), GroundedCollator(processor), trainer=_telling(run)))


def _conjunction(run: _Run) -> None:
    model, processor = _load(run, "grounded", **_WITH_WEIGHTS)
    told = run.stage.grounded
    config = run.config if told is None else run.config.replace(start_layer=told + 1)
    flexkit.patch_model(model, config, trained=True)
    collator = GroundedCollator(flexkit.FlexProcessor(processor, model))
    run.save(model, processor, run.fit(model, run.chats(), collator, AlphaRamp(), trainer=_telling(run)))


def _lookup(run: _Run) -> None:
    model, processor = _load(run, "base")
    set_seed(run.seed)  # for what the base lacks
    add_layer(model)
    add_letters(model, processor)
    lessons = Lookups(run.chats(), run.stage.batch, run.stage.lists)
    history = run.fit(model, lessons, LookupCollator(processor), per_device_train_batch_size=1)
    run.save(model, processor, history)


def _choosing(run: _Run) -> None:
    model, processor = _load(run, "lookup")
    run.save(model, processor, run.fit(model, run.chats(), Collator(processor)))


def _letters_in_sequence(run: _Run) -> None:
    model, processor = _load(run, "choosing")
    run.save(model, processor, run.fit(model, run.chats(), Collator(processor, in_sequence=True)))


def _telling(run: _Run) -> Any:
    layer = run.stage.grounded
    return Trainer if layer is None else partial(GroundedTrainer, layer=layer)


_WITH_WEIGHTS = {"attn_implementation": "eager"}
"""The only one that gives its weights, for the grounding loss."""


def _load(run: _Run, stage: str, **settings: Any) -> tuple[Any, Any]:
    """A model and its processor, all but its tower to be trained."""
    folder = trained(run.folder, stage)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="float32", **settings)
    model.model.vision_tower.requires_grad_(False)
    return model, LlavaProcessor.from_pretrained(folder)


_TRAINERS = {
    "tower": _tower,
    "base": _base,
    "added": _added,
    "tuned": _tuned,
    "in_sequence": _in_sequence,
    "grounded": _grounded,
    "conjunction": _conjunction,
    "lookup": _lookup,
    "choosing": _choosing,
    "letters_in_sequence": _letters_in_sequence,
}
