"""Models as shapes: their configs, by whatever name they are given, and themselves without weights."""

import copy
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from flexkit.accounting.known import KNOWN
from flexkit.errors import ConfigError, UnsupportedModelError

__all__ = ["config_of", "without_weights"]


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
    if given in CONFIG_MAPPING:
        return CONFIG_MAPPING[given]()
    try:
        return AutoConfig.from_pretrained(given)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{given!r} is none of {', '.join(KNOWN)}, no model type of transformers, and cannot be loaded as a folder "
            f"or hub id: {str(error).splitlines()[0]}"
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
    except ValueError as error:
        raise UnsupportedModelError(
            f"{config.model_type} is no model that transformers generates text about images with."
        ) from error
    return model.eval()
