"""What patching leaves on a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from flexkit.errors import PatchError
from flexkit.lazy import lazy
from flexkit.patching.config import FlexConfig
from flexkit.patching.decoder import DecoderLayer
from flexkit.patching.projection import ADDED
from flexkit.patching.wrappers import inner, inside

if TYPE_CHECKING:
    from flexkit.patching.call import FlexCall
    from flexkit.patching.geometry.base import Geometry

__all__ = ["ATTRIBUTE", "LOCK", "Patch", "added_parameters", "get_patch", "is_patched", "patched_model"]

ATTRIBUTE = "_flexkit_patch"
LOCK = Lock()
"""Held while it changes who uses a patch, and while one is taken away."""


@dataclass(repr=False)
class Patch:
    """One patched model; nothing in here belongs to a single call."""

    model: PreTrainedModel
    find_geometry: Callable[[Any], "Geometry"]
    """What finds the geometry of a model, of a copy too."""
    config: FlexConfig
    """The settings, with what followed the model filled in."""
    decoder: nn.Module
    layers: dict[int, DecoderLayer]
    """The layers whose attention is patched: those that read, and those whose map is read."""
    earlier: list[tuple[nn.Module, str, Any]]
    """Where patching sets a method on an instance, and what somebody had set there before, or None."""
    hooks: list[RemovableHandle]
    disabled: int = 0
    """How many ``disabled`` blocks are open."""
    recorders: list[Callable[["FlexCall"], None]] = field(default_factory=list)
    """Called with every finished call that read high-res tokens."""
    running: int = 0
    """How many calls of the model's methods have not ended."""

    def __repr__(self) -> str:
        policy, layers = self.config.policy, list(self.reading)
        return f"<patch of {type(self.model).__name__}: layers {layers[0]} to {layers[-1]} read, by {policy!r}>"

    def __getstate__(self) -> dict[str, Any]:
        # Blocks that are open and calls that run are the original's. A geometry may be made of lambdas.
        own = {name: value for name, value in vars(self).items() if name != "geometry"}
        return own | {"disabled": 0, "recorders": [], "running": 0}

    @lazy
    def geometry(self) -> "Geometry":
        """How the family of the model lays out its image tokens."""
        return self.find_geometry(self.model)

    @contextmanager
    def counted(self, name: str) -> Iterator[None]:
        """Count a block in the attribute of this name while it runs, whatever other threads do."""
        with LOCK:
            setattr(self, name, getattr(self, name) + 1)
        try:
            yield
        finally:
            with LOCK:
                setattr(self, name, getattr(self, name) - 1)

    def own_method(self, model: nn.Module, name: str) -> Callable[..., Any]:
        """A method as the model had it before it was patched."""
        for module, other, method in reversed(self.earlier):
            if module is model and other == name and method is not None:
                return method  # type: ignore[no-any-return]
        return partial(getattr(type(model), name), model)

    @property
    def start_layer(self) -> int:
        """The first layer that reads high-res tokens."""
        return self.config.start_layer  # type: ignore[return-value]

    def before(self, layer: int) -> int:
        """The patched layer in front of ``layer``; -1 if there is none. Layers without attention do not count."""
        return self._before[layer]

    @lazy
    def _before(self) -> dict[int, int]:
        return dict(zip(self.layers, [-1, *self.layers], strict=False))

    def source(self, layer: int) -> int:
        """The layer whose map selects what ``layer`` reads."""
        same = self.config.select_from == "same" or self.before(layer) < 0
        return layer if same else self.before(layer)

    @property
    def position_axes(self) -> int:
        """How many axes the rotary positions of this model may have."""
        rope = getattr(getattr(self.decoder, "config", None), "rope_parameters", None) or {}
        return len(rope.get("mrope_section", ())) or 3

    def projection(self, cache: object) -> str:
        """When K' and V' are computed in a generation with this cache.

        A static one may be compiled, and a graph cannot follow how many tokens have been read. The lower levels of a
        pyramid are too large to be encoded as a whole, whatever the cache.
        """
        whole = getattr(cache, "is_compileable", False) and self.config.levels == 1
        return "full" if whole else self.config.projection

    @property
    def reading(self) -> dict[int, DecoderLayer]:
        """The layers that read high-res tokens."""
        return {index: layer for index, layer in self.layers.items() if index >= self.start_layer}

    @property
    def sources(self) -> set[int]:
        """The layers whose maps are read."""
        return {self.source(layer) for layer in self.reading}


def is_patched(model: nn.Module) -> bool:
    """Whether a model is patched, or wraps one that is (PEFT, DistributedDataParallel), or is a part of one that is.

    Parameters
    ----------
    model : torch.nn.Module
        Any module.
    """
    return inside(model, ATTRIBUTE) is not None or any(_is_added(path) for path, _ in model.named_modules())


def get_patch(model: nn.Module) -> Patch:
    """What patching left on ``model``.

    Parameters
    ----------
    model : torch.nn.Module
        A patched model, or what wraps it.

    Raises
    ------
    PatchError
        If the model is not patched.
    """
    patch: Patch = vars(patched_model(model))[ATTRIBUTE]
    return patch


def patched_model(model: nn.Module) -> nn.Module:
    """The patched model that ``model`` is or wraps.

    Raises
    ------
    PatchError
        If there is none.
    """
    patched = inside(model, ATTRIBUTE)
    if patched is not None:
        return patched
    name = type(model).__name__
    if is_patched(model):
        raise PatchError(f"this {name} is part of a patched model; pass the one that flexkit.patch_model was given.")
    raise PatchError(f"this {name} is not patched; call flexkit.patch_model(model) first.")


def added_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that patching added, by their names in the ``state_dict`` of the patched model alone.

    Adapters that PEFT puts on an added projection are not among them; a copy that it trains in its place is.

    Parameters
    ----------
    model : torch.nn.Module
        A patched model, or what wraps it.
    """
    return {
        f"{path}.{name}": parameter
        for path, module in patched_model(model).named_modules(remove_duplicate=False)
        if _is_added(path)
        for name, parameter in inner(module).named_parameters()
    }


def _is_added(path: str) -> bool:
    return path.rpartition(".")[-1] in ADDED
