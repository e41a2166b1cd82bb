"""What transformers loads from a patched model's folder: the base model, which is told where nobody asked for it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from flexkit.checkpoints.flex import SETTINGS
from flexkit.remote_code import MODEL

__all__ = ["BaseModelWarning", "forget_code", "loading_the_base"]

_KNOWN = ContextVar("known", default=False)


class BaseModelWarning(UserWarning):
    """The folder of a patched model was loaded as the base model."""


@contextmanager
def loading_the_base() -> Iterator[None]:
    """Load a base model knowingly, without a warning."""
    token = _KNOWN.set(True)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def forget_code(config: Any) -> bool:
    """Take flexkit's loader out of the ``auto_map`` that a config was loaded with; whether it was there.

    It is of the folder and not of the model, which may be saved without its patch.
    """
    auto_map = getattr(config, "auto_map", None) or {}
    others = {auto_class: code for auto_class, code in auto_map.items() if not code.startswith(f"{MODEL}.")}
    if len(others) == len(auto_map):
        return False
    if others:
        config.auto_map = others
    else:
        del config.auto_map
    return True


def _tell(name: str | PathLike[str], subfolder: str, model: PreTrainedModel) -> None:
    older = Path(name, subfolder, SETTINGS).is_file()
    if (forget_code(model.config) or older) and not _KNOWN.get():
        warnings.warn(
            f"{name} holds a model that flexkit patched, and this {type(model).__name__} is its base model, which "
            "ignores what was added and every high-res view. flexkit.from_pretrained, and transformers' Auto classes "
            "with trust_remote_code=True, load the patched one; flexkit.load_flex makes this one the same.",
            BaseModelWarning,
            stacklevel=3,
        )


def _watched(load: Any) -> Any:
    """``PreTrainedModel.from_pretrained`` that tells of patched models; nothing else in it changes."""

    @wraps(load)
    def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, *args, **kwargs)
        name = args[0] if args else kwargs["pretrained_model_name_or_path"]
        if name is not None:  # given a state_dict in its place
            _tell(name, kwargs.get("subfolder") or "", loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    return classmethod(from_pretrained)


PreTrainedModel.from_pretrained = _watched(PreTrainedModel.from_pretrained.__func__)
