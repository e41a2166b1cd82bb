"""What patching leaves on a model: its settings, and functions that stand for some of its methods."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from threading import Lock
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from flexkit.errors import ConfigError, PatchError
from flexkit.patching.config import FlexConfig
from flexkit.patching.geometry.base import PREFIX, Geometry, features_owner
from flexkit.patching.seam.decoder import DecoderLayer
from flexkit.patching.seam.projections import ADDED, innermost

__all__ = [
    "ATTRIBUTE",
    "LOCK",
    "Method",
    "Patch",
    "added_parameters",
    "get_patch",
    "is_patched",
    "of_class",
    "overridden",
    "patched_model",
    "refuse_sharing",
    "state_of_copies",
]

ATTRIBUTE = "_flexkit_patch"
LOCK = Lock()
"""Held while it changes who uses a patch, and while one is taken away."""


@dataclass(repr=False)
class Patch:
    """One patched model; nothing in here belongs to a single call."""

    model: PreTrainedModel
    find_geometry: Callable[[Any], Geometry]
    """What finds the geometry of a model, of a copy too."""
    route: Any
    """How a call reaches the attention that reads (a :class:`~flexkit.patching.call.route.Route`)."""
    config: FlexConfig
    """The settings, with what followed the model filled in."""
    decoder: nn.Module
    layers: dict[int, DecoderLayer]
    """The layers whose attention is patched: those that read, and those whose map is read."""
    earlier: list[tuple[nn.Module, str, Any]]
    """Where patching sets a method on an instance, and what somebody had set there before, or None."""
    hooks: list[RemovableHandle]
    disabled: int = 0
    """How many ``disabled`` blocks are open that hold everywhere."""
    recorders: list[Callable[[Any], None]] = field(default_factory=list)
    """Called with every finished call that read high-res tokens."""
    overrides: int = 0
    """How many blocks are open in which a thread or task has settings of its own."""
    running: int = 0
    """How many calls of the model's methods have not ended."""
    before: dict[int, int] = field(init=False)
    """Of each patched layer the one in front of it; -1 if there is none. Layers without attention do not count."""

    def __post_init__(self) -> None:
        self.before = dict(zip(self.layers, [-1, *self.layers], strict=False))

    def __repr__(self) -> str:
        policy, layers = self.config.policy, list(self.reading)
        return f"<patch of {type(self.model).__name__}: layers {layers[0]} to {layers[-1]} read, by {policy!r}>"

    def __getstate__(self) -> dict[str, Any]:
        # Blocks that are open and calls that run are the original's. A geometry may be made of lambdas.
        own = {name: value for name, value in vars(self).items() if name not in ("geometry", "views")}
        return own | {"disabled": 0, "recorders": [], "overrides": 0, "running": 0}

    @cached_property
    def geometry(self) -> Geometry:
        """How the family of the model lays out its image tokens."""
        return self.find_geometry(self.model)

    @cached_property
    def views(self) -> dict[Geometry, tuple[str, ...]]:
        """What shows a high-res view of images, by the names of arguments, and of videos if the model takes some."""
        found = {self.geometry: (*self.geometry.inputs, "image_sizes", "tiles")}
        video = self.geometry.video
        taken = inspect.signature(type(self.model).forward).parameters
        if (
            video is not None
            and {*video.inputs} <= {*taken}
            and hasattr(features_owner(self.model, video.features), video.features)
        ):
            found[video] = (*video.inputs, "frames")
        return {geometry: tuple(PREFIX + name for name in names) for geometry, names in found.items()}

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

    def source(self, layer: int) -> int:
        """The layer whose map selects what ``layer`` reads."""
        before = -1 if self.config.select_from == "same" else self.before[layer]
        return layer if before < 0 else before

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
        if self.config.select_layers is not None:
            return set(map(int, self.config.select_layers))  # resolved
        first: Any = self.config.start_layer
        return {self.source(layer) for layer in self.layers if layer >= first}


_OVERRIDES: ContextVar[tuple[tuple[Patch, dict[str, Any]], ...]] = ContextVar("overrides", default=())
"""Of the running thread and task: patches, and fields that they have instead of their own; inner blocks last."""


@contextmanager
def overridden(patch: Patch, **fields: Any) -> Iterator[None]:
    """Let a patch have other fields while the block runs, for this thread and task alone; recorders are added."""
    block = patch, fields
    _OVERRIDES.set((*_OVERRIDES.get(), block))
    try:
        with patch.counted("overrides"):
            yield
    finally:  # blocks that were opened later may still be
        _OVERRIDES.set(tuple(other for other in _OVERRIDES.get() if other is not block))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph would keep the settings that it was made with
def _overridden(patch: Patch) -> Patch:
    fields: dict[str, Any] = {"recorders": list(patch.recorders)}
    for other, changed in _OVERRIDES.get():
        if other is patch:
            fields |= changed | {"recorders": fields["recorders"] + changed.get("recorders", [])}
    twin = replace(patch, **fields)
    twin.geometry = patch.geometry
    return twin


def is_patched(model: nn.Module) -> bool:
    """Whether a model is patched, or wraps one that is (PEFT, DistributedDataParallel), or is a part of one that is.

    Parameters
    ----------
    model : torch.nn.Module
        Any module.
    """
    return _inside(model) is not None or any(_is_added(path) for path, _ in model.named_modules())


def get_patch(model: nn.Module, *, here: bool = False) -> Patch:
    """What patching left on ``model``.

    Parameters
    ----------
    model : torch.nn.Module
        A patched model, or what wraps it.
    here : bool
        Whether it is asked for as the calling thread and task have it, with what their blocks override.

    Raises
    ------
    PatchError
        If the model is not patched.
    """
    own = vars(model).get(ATTRIBUTE)
    patch: Patch = vars(patched_model(model))[ATTRIBUTE] if own is None else own
    return _overridden(patch) if here and patch.overrides else patch


def patched_model(model: nn.Module) -> nn.Module:
    """The patched model that ``model`` is or wraps.

    Raises
    ------
    PatchError
        If there is none.
    """
    patched = _inside(model)
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
        for name, parameter in innermost(module).named_parameters()
    }


def _inside(model: nn.Module) -> nn.Module | None:
    """The outermost module that patching was given, ``model`` itself first; None if there is none."""
    return next((module for module in model.modules() if ATTRIBUTE in vars(module)), None)


def _is_added(path: str) -> bool:
    return path.rpartition(".")[-1] in ADDED


class Method:
    """A function that stands for a method of a module while the model around it is patched.

    Unlike a bound method it can be pickled, and its copy belongs to the copy of the module.

    Parameters
    ----------
    name : str
        Of the method, whose signature it has; if the function has an attribute ``signature_of``, from the module to a
        signature, it has that.
    function : callable
        Takes the module first.
    module : torch.nn.Module
        Whose method it is.
    patch : Patch
        Of the model.
    is_shared : bool
        Whether it stands in a shallow copy of the module, and so belongs to another.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], module: nn.Module, patch: Patch, *, is_shared: bool = False
    ) -> None:
        self.name, self.__func__, self.__self__ = name, function, module
        self.patch, self.is_shared = patch, is_shared

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"is_shared": False}  # what is made of it by deepcopy or pickle shares nothing

    def __getattr__(self, name: str) -> Any:
        # As bound methods do: torch.export asks for the code. Copies and pickles ask before there is a function.
        if "__func__" not in vars(self):
            raise AttributeError(name)
        return getattr(self.__func__, name)

    @property
    def __signature__(self) -> inspect.Signature:
        signature_of: Callable[[nn.Module], inspect.Signature] | None = getattr(self.__func__, "signature_of", None)
        return signature_of(self.__self__) if signature_of else inspect.signature(of_class(self.__self__, self.name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _SETTINGS.isdisjoint(kwargs):
            return _with_settings(self, args, kwargs)
        if torch.compiler.is_compiling():
            return self.__func__(self.__self__, *args, **kwargs)
        if self.is_shared:
            refuse_sharing(self.__self__)
        with self.patch.counted("running"):
            return self.__func__(self.__self__, *args, **kwargs)


_SETTINGS = frozenset({"hd_policy", "hd_disabled", "hd_trace"})
"""Arguments of every method of a patched model: what holds for this call alone."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _with_settings(method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method with settings of its own."""
    policy, disabled, trace = (kwargs.pop(name, None) for name in ("hd_policy", "hd_disabled", "hd_trace"))
    fields: dict[str, Any] = {}
    if policy is not None:
        fields["config"] = _overridden(method.patch).config.replace(policy=policy)
    if disabled is not None:
        fields["disabled"] = int(disabled)
    if trace is not None:
        if not hasattr(trace, "record"):
            raise ConfigError(f"hd_trace must be a flexkit.Trace, which the call fills; got {type(trace).__name__}.")
        fields["recorders"] = [trace.record]
    with overridden(method.patch, **fields):
        return method(*args, **kwargs)


def of_class(module: nn.Module, name: str) -> Callable[..., Any]:
    """A method of a module's class, static or not, whatever is set on the module."""
    method: Callable[..., Any] = inspect.getattr_static(type(module), name).__get__(module, type(module))
    return method


def state_of_copies(self: nn.Module) -> dict[str, Any]:
    """``__getstate__`` of a patched model, which all its copies and pickles are made of."""
    state: dict[str, Any] = of_class(self, "__getstate__")()
    shared = {
        name: Method(name, method.__func__, method.__self__, method.patch, is_shared=True)
        for name, method in state.items()
        if isinstance(method, Method)
    }
    return state | shared


def refuse_sharing(self: nn.Module, *args: object) -> NoReturn:
    """Raise :class:`~flexkit.errors.PatchError`: something would run a patched model with another one's parts.

    It stands for ``_replicate_for_data_parallel``, by which DataParallel makes shallow copies.
    """
    raise PatchError(
        f"a shallow copy of a patched {type(self).__name__} cannot be used, since it shares its layers with the "
        "original: make a deep one (copy.deepcopy), and use DistributedDataParallel in the place of DataParallel."
    )
