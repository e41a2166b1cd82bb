"""The trained weights that flexkit is shipped with."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

import flexkit
from flexkit.checkpoints.files import checked_folder
from flexkit.checkpoints.tensors import read_tensors
from flexkit.errors import CheckpointError, first_line

__all__ = ["ADAPTER", "READERS", "WEIGHTS", "load_model", "trained"]

WEIGHTS = Path(__file__).parent / "weights"
"""Folders of models and of what patching added to them, as :mod:`flexkit.visual_search.training` writes them."""
ADAPTER = "adapter_config.json"
"""Of a stage, in the place of config.json where a base is an adapter of a pretrained language model."""
READERS = {"attribute": "tuned", "conjunction": "conjunction", "low-res": "tuned"}
"""For each track the stage whose model reads."""


def load_model(
    stage: str = "tuned", *, weights: Path = WEIGHTS, policy: Any = None
) -> tuple[LlavaForConditionalGeneration, Any]:
    """Load a trained model that searches scenes, and its processor.

    Parameters
    ----------
    stage : str
        ``"base"`` sees the low-res view only, ``"in_sequence"`` all high-res tokens in its sequence: they are not
        patched. ``"added"`` is the base with trained projections, ``"tuned"`` has its language model trained along, and
        ``"conjunction"`` has seen questions that take both colour and shape.
    weights : pathlib.Path
        A folder that training wrote, from nothing or on a pretrained language model; by default what flexkit is shipped
        with.
    policy : Policy or callable, optional
        Takes the place of the one that a patched model was trained with.

    Returns
    -------
    model : transformers.LlavaForConditionalGeneration
        In float32 and eval mode.
    processor : FlexProcessor or transformers.ProcessorMixin
        Of both views if the model is patched.

    Raises
    ------
    CheckpointError
        If the folder does not hold that stage and the base, or a file of theirs is damaged.

    Examples
    --------
    >>> from flexkit.visual_search import draw_scene, load_model
    >>> model, processor = load_model()
    >>> question = "<image> Which digit is on the object that is yellow?"
    >>> inputs = processor(images=draw_scene(0).image, text=question, return_tensors="pt")
    >>> processor.decode(model.generate(**inputs, max_new_tokens=2)[0, -2:], skip_special_tokens=True)
    '9'
    """
    base, own = (trained(weights, name) for name in ("base", stage))
    whole = own if (own / "config.json").exists() else base
    if (whole / ADAPTER).exists():
        from flexkit.visual_search.pretrained import load_base  # which takes its tower from here

        model, processor = load_base(weights)
    else:
        model, processor = _load(whole, base)
    if not (own / "flexkit.json").exists():
        return model, processor
    model = flexkit.load_flex(model, own, policy=policy)
    return model, flexkit.FlexProcessor(processor, model)


def _load(whole: Path, base: Path) -> tuple[Any, Any]:
    for folder in {whole, base}:
        checked_folder(folder)
    try:
        with torch.device("meta"):
            described = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(whole)).num_parameters()
        if described > sum(tensor.numel() for tensor in read_tensors(whole).values()):
            raise CheckpointError(f"config.json describes {described} weights, more than there are")
        with _without_progress_bar():
            model, report = LlavaForConditionalGeneration.from_pretrained(
                whole, dtype=torch.float32, output_loading_info=True
            )
        processor = LlavaProcessor.from_pretrained(base)
    except Exception as error:  # each library behind transformers has errors of its own for files that are damaged
        raise CheckpointError(f"{whole} cannot be loaded ({first_line(error)}); train it or copy it again.") from error
    odd = sorted(str(name) for names in report.values() for name in names)
    if odd:
        raise CheckpointError(
            f"the tensors in {whole} do not fit its config.json: {odd[0]}; train it or copy it again."
        )
    return model, processor


def trained(weights: Path, stage: str) -> Path:
    """The folder of a stage.

    Parameters
    ----------
    weights : pathlib.Path
        Where training wrote its stages.
    stage : str
        Its name.

    Raises
    ------
    CheckpointError
        If it is not there.
    """
    folder = weights / stage
    if not any((folder / name).exists() for name in ("config.json", "flexkit.json", ADAPTER)):
        raise CheckpointError(
            f"there is no trained {stage!r} in {str(weights)!r}: train that stage first, or give another folder."
        )
    return folder


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """It would be gone before anyone has seen it."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
