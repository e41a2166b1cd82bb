"""The folders in which stages of training stand."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

from flexkit.checkpoints.base_loads import loading_the_base
from flexkit.checkpoints.files import checked_folder
from flexkit.checkpoints.tensors import read_tensors
from flexkit.errors import CheckpointError, first_line

__all__ = ["ADAPTER", "WEIGHTS", "load_whole", "trained"]

WEIGHTS = Path(__file__).parent / "weights"
"""Folders of models and of what patching added to them, as :mod:`flexkit.visual_search.training` writes them."""
ADAPTER = "adapter_config.json"
"""Of a stage, in the place of config.json where a base is an adapter of a pretrained language model."""


def load_whole(whole: Path) -> tuple[Any, Any]:
    """Load a model that is in no need of another, and its processor.

    Parameters
    ----------
    whole : pathlib.Path
        The folder of its stage.

    Raises
    ------
    CheckpointError
        If a file there is missing or damaged.
    """
    checked_folder(whole)
    try:
        with torch.device("meta"):
            described = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(whole)).num_parameters()
        if described > sum(tensor.numel() for tensor in read_tensors(whole).values()):
            raise CheckpointError(f"config.json describes {described} weights, more than there are")
        with _without_progress_bar(), loading_the_base():
            model, report = LlavaForConditionalGeneration.from_pretrained(
                whole, dtype=torch.float32, output_loading_info=True
            )
        processor = LlavaProcessor.from_pretrained(whole)
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
