"""What patching leaves on a model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from flexkit.errors import PatchError
from flexkit.lazy import lazy
from flexkit.patching.config import FlexConfig
from flexkit.patching.decoder import DecoderLayer
from flexkit.patching.projection import ADDED
from flexkit.patching.wrappers import inner, inside

if TYPE_CHECKING:
    from flexkit.patching.call import FlexCall
    from flexkit.patching.geometry.base import Geometry

__all__ = ["ATTRIBUTE", "METHODS", "Patch", "added_parameters", "get_patch", "is_patched", "patched_model"]

ATTRIBUTE = "_flexkit_patch"
METHODS: dict[str, Callable[..., Any]] = {}
"""Functions that stand for methods of a model while it is patched, by name; the modules that define them add them."""


@dataclass
class Patch:
    """One patched model; nothing in here belongs to a single call."""

    config: FlexConfig
    """The settings, with what followed the model filled in."""
    geometry: "Geometry"
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
    """Whether ``model``, or a model that it wraps (PEFT, DistributedDataParallel), is patched.

    Parameters
    ----------
    model : torch.nn.Module
        Any module.
    """
    return inside(model, ATTRIBUTE) is not None


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
    if patched is None:
        raise PatchError(f"this {type(model).__name__} is not patched; call flexkit.patch_model(model) first.")
    return patched


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
        if path.rpartition(".")[-1] in ADDED
        for name, parameter in inner(module).named_parameters()
    }
