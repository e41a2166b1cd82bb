"""Trained adapters: the stock model that they and a language model make."""

from pathlib import Path
from typing import Any

from transformers import LlavaProcessor

from flexkit.checkpoints.files import checked_folder
from flexkit.errors import CheckpointError, FlexkitError, first_line
from flexkit.visual_search.pretrained.language import load_language_model
from flexkit.visual_search.pretrained.model import build_base
from flexkit.visual_search.stages import ADAPTER

__all__ = ["load_base"]


def load_base(weights: Path, language_model: str | None = None, *, merged: bool = True) -> tuple[Any, LlavaProcessor]:
    """Load a base on a pretrained language model.

    Parameters
    ----------
    weights : pathlib.Path
        A folder that :func:`~flexkit.visual_search.pretrained.training.train_base` wrote.
    language_model : str, optional
        What the adapter was trained on, if it is no longer where it was then.
    merged : bool
        Whether the adapter becomes part of the weights. If not, it stays beside them, in a model of PEFT.

    Returns
    -------
    model : transformers.LlavaForConditionalGeneration or peft.PeftModel
        In float32 and eval mode.
    processor : transformers.LlavaProcessor
        Of the model; its chat template asks as training did.

    Raises
    ------
    CheckpointError
        If the folder holds no such base, a file of it is damaged, or there is no such language model.
    """
    from peft import PeftConfig, PeftModel

    folder = weights / "base"
    if not (folder / ADAPTER).exists():
        raise CheckpointError(
            f"there is no base on a pretrained language model in {str(weights)!r}: train one with "
            "flexkit train visual-search --language-model, or give another folder."
        )
    checked_folder(folder)
    try:
        processor = LlavaProcessor.from_pretrained(folder)
        model = build_base(
            load_language_model(language_model or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path),
            processor,
        )
        adapted = PeftModel.from_pretrained(model, folder)
    except FlexkitError:
        raise
    except Exception as error:  # each library behind peft has errors of its own for files that are damaged
        raise CheckpointError(
            f"{folder} cannot be loaded ({first_line(error)}); train it or copy it again, and give the language model "
            "that it was trained on."
        ) from error
    return (adapted.merge_and_unload() if merged else adapted).eval(), processor
