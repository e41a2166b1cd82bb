"""Finding the geometry of a model, and adding one for a model of your own."""

from collections.abc import Callable
from typing import Any

from flexkit.errors import ConfigError, UnsupportedModelError
from flexkit.patching.families import FAMILIES, REFUSED
from flexkit.patching.geometry.base import Geometry

__all__ = ["find_geometry", "register_geometry", "supported_models"]

_registered: dict[str, Geometry | Callable[[Any], Geometry]] = dict(FAMILIES)


def supported_models() -> list[str]:
    """The model types that :func:`flexkit.patch_model` takes, in alphabetical order.

    A model type is what ``model.config.model_type`` says. Types of later versions of transformers than the one that is
    installed are among them, as are those added by :func:`register_geometry`.

    Examples
    --------
    >>> "qwen2_5_vl" in supported_models()
    True
    """
    return sorted(_registered)


def register_geometry(model_type: str, geometry: Geometry) -> None:
    """Tell flexkit how a model type lays out its image tokens, so that models of that type can be patched.

    Parameters
    ----------
    model_type : str
        What ``model.config.model_type`` says; a type that flexkit knows already gets the new geometry.
    geometry : Geometry
        One of flexkit's, or a subclass of your own.

    Raises
    ------
    ConfigError
        If ``geometry`` is no :class:`~flexkit.Geometry` instance.
    """
    if isinstance(geometry, type):
        raise ConfigError(f"geometry must be an instance of flexkit.Geometry; pass {geometry.__name__}(...).")
    if not isinstance(geometry, Geometry):
        raise ConfigError(f"geometry must be an instance of flexkit.Geometry, got {geometry!r}.")
    inputs: object = geometry.inputs
    if isinstance(inputs, str):
        raise ConfigError(f"{type(geometry).__name__}.inputs must be a tuple of names, got the str {inputs!r}.")
    _registered[model_type] = geometry


def find_geometry(model: Any) -> Geometry:
    """The geometry of a model's type, checked against the model.

    Raises
    ------
    UnsupportedModelError
        If the type is unknown or refused, or the model lacks what its type should have.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _registered:
        entry = _registered[model_type]
        geometry = entry if isinstance(entry, Geometry) else entry(model.config)
        geometry.check_model(model)
        return geometry
    reason = REFUSED.get(
        str(model_type),
        "the geometry of its image tokens is not known. flexkit.supported_models() lists the types that are; "
        "flexkit.register_geometry adds one",
    )
    raise UnsupportedModelError(f"{type(model).__name__} (model type {model_type!r}) cannot be patched: {reason}.")
