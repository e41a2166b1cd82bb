"""Models as shapes: their configs, by whatever name they are given, and themselves without weights."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from flexkit.accounting.known import KNOWN
from flexkit.errors import ConfigError, FlexkitError, UnsupportedModelError, first_line

__all__ = ["config_of", "counting", "without_weights"]


def config_of(given: PreTrainedModel | PretrainedConfig | str) -> Any:
    """A config that may be changed.

    Parameters
    ----------
    given : transformers.PreTrainedModel or transformers.PretrainedConfig or str
        A model, its config, a folder or hub id, one of :data:`flexkit.accounting.known.KNOWN`, or a model type, of
        which the default sizes are taken.

    Raises
    ------
    ConfigError
        If it is none of these.
    """
    if not isinstance(given, str):
        return copy.deepcopy(given.config if isinstance(given, PreTrainedModel) else given)
    if given in KNOWN:
        return KNOWN[given]()
    try:
        return CONFIG_MAPPING[given]() if given in CONFIG_MAPPING else AutoConfig.from_pretrained(given)
    except Exception as error:  # a stranger's file, read by the code of any family
        names = f"is none of {', '.join(KNOWN)}, no model type of transformers, and"
        found = "" if Path(given).exists() else f"{names} "
        raise ConfigError(f"{given!r} {found}cannot be loaded as a folder or hub id: {_in_short(error)}") from error


@contextmanager
def counting(model: PreTrainedModel) -> Iterator[None]:
    """Tell what goes wrong while a model without weights runs.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        On the meta device.

    Raises
    ------
    UnsupportedModelError
        In the place of whatever the code of its family raises on shapes of these sizes.
    """
    try:
        yield
    except FlexkitError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be counted without weights at these sizes: {_in_short(error)}"
        ) from error


def without_weights(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model of a config on the meta device.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Of a vision-language model.
    dtype : torch.dtype
        Of its weights.

    Raises
    ------
    UnsupportedModelError
        If it is no model that answers in text about images.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    except Exception as error:
        of = f"{config.model_type} is no model that transformers generates text about images with"
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            of = f"no {config.model_type} can be built from this config"
        raise UnsupportedModelError(f"{of}: {_in_short(error)}") from error
    return model.eval()


def _in_short(error: Exception) -> str:
    """What an error of somebody else's code is and says, in a line."""
    kind, said = type(error).__name__, first_line(error)
    return kind if said == kind else f"{kind}: {said}"
