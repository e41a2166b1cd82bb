"""High-res features without encoding code for any family: show the model a tile, and see what its attention is given.

To encode a tile, it takes the place of the image in the model's inputs, and the model runs until its first reading
attention begins. What that is given to make keys and values of, at the columns of the image's cells, are the features:
exactly what low-res keys are made of, with all that lies between tower and attention.
"""

from collections.abc import Mapping
from functools import partial
from threading import local
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexkit.errors import HighResInputError
from flexkit.patching.context.carriers import argument
from flexkit.patching.forward import base_forward

__all__ = ["show", "watch"]


class _Thread(local):
    """What a thread does; see the carriers."""

    def __init__(self) -> None:
        self.shows = False


_thread = _Thread()


class _Shown(Exception):  # noqa: N818 - not an error: it ends the run of a model that is shown a tile
    def __init__(self, states: Tensor) -> None:
        self.states = states


def watch(module: nn.Module, source: str) -> RemovableHandle:
    """Let runs of :func:`show` end where ``module`` begins, which takes the context as its argument ``source``."""
    return module.register_forward_pre_hook(partial(_stop, source=source), with_kwargs=True)


@torch.no_grad()
def show(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """What the first reading attention of a patched model is given for these inputs of the base model.

    Raises
    ------
    HighResInputError
        If no attention reads an image then.
    """
    _thread.shows = True
    try:
        base_forward(model)(**inputs)
    except _Shown as shown:
        return shown.states
    finally:
        _thread.shows = False
    raise HighResInputError(f"{type(model).__name__} looked at no image for these inputs; pass those of its images.")


def _stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, source: str) -> None:
    if _thread.shows:
        raise _Shown(argument(module, args, kwargs, source))
