"""A model and its processor, by a name and a preset."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig

import flexkit
from flexkit.errors import CheckpointError, ConfigError, FlexkitError, first_line

__all__ = ["NONE", "PRESETS", "load_model_and_processor"]

PRESETS = {"published": flexkit.FlexConfig.published, "training_free": flexkit.FlexConfig.training_free}
"""How a base model is patched."""
NONE = "none"
"""In the place of a preset: a base model stays as it is."""

_PUBLISHED = "llava_llama"
"""Model type of what the authors of FlexAttention published."""
_HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder")


def load_model_and_processor(
    name: str, preset: str | None = None, settings: Mapping[str, Any] | None = None, **options: Any
) -> tuple[Any, Any]:
    """Load a model, and the processor of its base model.

    Parameters
    ----------
    name : str
        A folder or a repository on the Hugging Face hub. Without a preset it holds a patched model that was saved, or a
        checkpoint that the authors of FlexAttention published; with one, a base model.
    preset : {"published", "training_free", "none"}, optional
        How the base model is patched, or that it is not.
    settings : mapping, optional
        Fields of :class:`flexkit.FlexConfig`, in place of the preset's; of a saved model ``policy`` alone.
    **options
        Of ``from_pretrained`` of the model: ``dtype``, ``device_map``, ``attn_implementation``, ``revision``, ...

    Returns
    -------
    model : transformers.PreTrainedModel
        In eval mode.
    processor : transformers.ProcessorMixin
        To be wrapped in a :class:`flexkit.FlexProcessor`.

    Raises
    ------
    ConfigError
        If there is no such preset or setting, or it cannot be set here.
    CheckpointError
        If there is no such model, or its files cannot be loaded.
    """
    settings = dict(settings or {})
    _check(name, preset, settings)
    hub = {key: value for key, value in options.items() if key in _HUB}
    code = {key: value for key, value in options.items() if key == "trust_remote_code"}
    try:
        if preset is not None:
            model = AutoModelForImageTextToText.from_pretrained(name, **options).eval()
        elif PreTrainedConfig.get_config_dict(name, **hub)[0].get("model_type") == _PUBLISHED:
            return _published(name, settings, hub, **options)
        else:
            model = flexkit.from_pretrained(name, **settings, **options)
        processor = AutoProcessor.from_pretrained(name, **hub, **code)
        if isinstance(processor, flexkit.FlexProcessor):  # a saved one, whose code is trusted
            processor = processor.processor
    except CheckpointError as error:
        raise CheckpointError(f"{error} For a base model, give a preset: {', '.join((*PRESETS, NONE))}.") from error
    except FlexkitError:
        raise
    except Exception as error:  # a stranger's files, read by the code of any family
        raise CheckpointError(f"{name!r} cannot be loaded: {first_line(error)}") from error
    if preset in PRESETS:
        flexkit.patch_model(model, PRESETS[preset](**settings))
    return model, processor


def _check(name: str, preset: str | None, settings: Mapping[str, Any]) -> None:
    if preset not in (None, NONE, *PRESETS):
        raise ConfigError(f"preset is one of {', '.join((*PRESETS, NONE))}, got {preset!r}.")
    fixed = sorted(settings.keys() - ({"policy"} if preset is None else set()))
    if preset in (None, NONE) and fixed:
        of = f"{name}, which is patched already" if preset is None else "a base model that is not patched"
        raise ConfigError(f"{', '.join(fixed)} cannot be set of {of}: give a preset, one of {', '.join(PRESETS)}.")
    flexkit.FlexConfig.from_dict({key: value for key, value in settings.items() if key != "policy"})


def _published(
    name: str,
    settings: Mapping[str, Any],
    hub: dict[str, Any],
    *,
    dtype: Any = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    **_: Any,
) -> tuple[Any, Any]:
    if device_map is not None:
        raise ConfigError("a published checkpoint is loaded onto one device: give a device in place of device_map.")
    model = flexkit.load_llava_flexattn(name, dtype=None if dtype == "auto" else dtype, **hub)
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    if "policy" in settings:
        flexkit.set_policy(model, settings["policy"])
    return model, flexkit.load_llava_flexattn_processor(name, **hub)
