"""From a language model that knows only text to one that answers scenes: a projector, and LoRA on its attention."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import set_seed

from flexkit.errors import CheckpointError
from flexkit.training.processes import alone
from flexkit.visual_search.data import Chats
from flexkit.visual_search.dense import DenseScenes
from flexkit.visual_search.pretrained.language import load_language_model, load_tokenizer
from flexkit.visual_search.pretrained.model import build_base, build_base_processor
from flexkit.visual_search.pretrained.packing import AnswerTrainer, PackedChats, pack
from flexkit.visual_search.pretrained.warm_start import WordRegression
from flexkit.visual_search.pretrained.words import class_word_ids
from flexkit.visual_search.recipe import PRETRAINED_STAGES, Stage
from flexkit.visual_search.running import Run
from flexkit.writing import writing

__all__ = ["train_base"]

_TURNS = 24
"""Questions about a picture: all that can be asked about eight objects."""
_DISTINCT = 0.75
"""How often all objects of a picture differ in colour, which is where there is most to ask about."""
_SHORT = 0.5
"""Share of the pictures, the first ones, that are asked about in three words: the number of answers is what teaches."""
_PROJECTOR = "projector.safetensors"


def train_base(
    folder: Path,
    language_model: str,
    *,
    seed: int = 0,
    stages: Mapping[str, Stage] = PRETRAINED_STAGES,
    workers: int = 1,
    quiet: bool = False,
) -> None:
    """Train the stages whose results a folder lacks; a stage that was cut off goes on from its last checkpoint.

    Neither the tower nor a weight of the language model is changed. No attention is told where to look, and no digit of
    a whole scene is asked for. Several processes (``accelerate launch``) share each step's pictures.

    Parameters
    ----------
    folder : pathlib.Path
        Gets a folder for each stage: ``projector``, and ``base`` with an adapter of PEFT, the projector in it, a
        processor and ``log.json``, for :func:`flexkit.visual_search.pretrained.load_base`.
    language_model : str
        As for :func:`~flexkit.visual_search.pretrained.language.load_language_model`; its attention has projections
        ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``.
    seed : int
        Of weights, scenes and questions.
    stages : mapping of str to Stage
        What to train, in this order.
    workers : int
        Processes that draw scenes; 0 draws in between.
    quiet : bool
        Without progress bars.

    Raises
    ------
    ConfigError
        If the folder cannot be written, or another training writes to it.
    CheckpointError
        If there is no such language model, or the stage that another builds on is not in the folder.
    UnsupportedModelError
        If the language model takes several tokens to say an answer.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        runs = [
            Run(folder, name, stage, 10 * seed + list(PRETRAINED_STAGES).index(name), workers, quiet)
            for name, stage in stages.items()
        ]
        left = [run for run in runs if not run.log.exists()]
        if not left:
            return
        processor = build_base_processor(load_tokenizer(language_model))
        model = build_base(load_language_model(language_model), processor, seed)
        for run in left:
            _TRAINERS[run.name](run, model, processor, language_model)


def _projector(run: Run, model: Any, processor: Any, language_model: str) -> None:
    reader = WordRegression(model, class_word_ids(processor.tokenizer))
    scenes = DenseScenes(run.seed, run.stage.steps * run.stage.batch, processor.image_processor)
    history = run.fit(reader, scenes, DenseScenes.collate, weight_decay=0.0)
    run.finish(lambda folder: save_file(reader.projector.state_dict(), folder / _PROJECTOR), history)


def _base(run: Run, model: Any, processor: Any, language_model: str) -> None:
    warm = run.folder / "projector" / _PROJECTOR
    if not warm.exists():
        raise CheckpointError(f"there is no trained 'projector' in {str(run.folder)!r}: train that stage first.")
    model.model.multi_modal_projector.load_state_dict(load_file(warm))
    set_seed(run.seed)  # for the adapter
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=r".*\.language_model\..*\.[qkvo]_proj",
        modules_to_save=["multi_modal_projector"],
    )
    adapted: Any = get_peft_model(model, lora)
    count = run.stage.steps * run.stage.batch
    chats = Chats(run.seed, count, run.stage.tracks, _TURNS, distinct=_DISTINCT)
    history = run.fit(
        adapted,
        PackedChats(chats, processor, round(_SHORT * count)),
        pack,
        trainer=AnswerTrainer,
        weight_decay=0.0,
        train_sampling_strategy="sequential",
        logging_steps=10,
    )

    def write(folder: Path) -> None:
        adapted.active_peft_config.base_model_name_or_path = language_model
        adapted.half().save_pretrained(folder, save_embedding_layers=False)
        processor.save_pretrained(folder)

    run.finish(write, history)


_TRAINERS = {"projector": _projector, "base": _base}
