"""How a call reaches the attention that reads: by keyword, or across the gaps where a model drops keywords."""

import inspect
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import local
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.hooks import RemovableHandle

from flexkit.errors import ConfigError
from flexkit.patching.call.call import FlexCall
from flexkit.patching.context.own_code import HEADS
from flexkit.patching.context.sites import Site
from flexkit.patching.seam.attention import reached
from flexkit.patching.seam.config_view import CALL
from flexkit.patching.state import Patch

__all__ = ["Carrier", "Door", "Held", "Keyword", "Tag", "argument", "carried", "held", "held_in", "read_beside"]

Find = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], str], FlexCall | None]
"""The call that a reading module got: of the module, what it is called with, and the name of its source argument."""


class Carried(Protocol):
    """A call, or what a call can be made of."""

    @property
    def patch(self) -> Patch:
        """Of the model that it is for."""


class _Thread(local):
    """What a thread carries: an attribute and no ContextVar, so that a graph of torch.compile is guarded by it."""

    def __init__(self) -> None:
        self.held: Carried | None = None


_thread = _Thread()


@contextmanager
def carried(value: Carried) -> Iterator[None]:
    """Hold a call, or what a call can be made of, while the block runs; other threads do not see it."""
    earlier, _thread.held = _thread.held, value
    try:
        yield
    finally:
        _thread.held = earlier


def held(patch: Patch) -> Carried | None:
    """What is carried now for a patched model: an assistant of its generation may be another."""
    value = _thread.held
    return value if value is not None and value.patch.model is patch.model else None


def held_in(module: nn.Module) -> Carried | None:
    """What is carried now for the model that a module is a part of."""
    value = _thread.held
    if value is None or {site.attention for site in value.patch.layers.values()}.isdisjoint(module.modules()):
        return None
    return value


def argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """One argument of a module's call, however it was passed."""
    return inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments.get(name)


class Carrier(ABC):
    """One way."""

    find: Find

    def run(self, forward: Callable[..., Any], call: FlexCall, inputs: Mapping[str, Any]) -> Any:
        """The model's own forward with a call."""
        with carried(call):
            return forward(**inputs)

    def hooks(self, model: nn.Module, sites: Sequence[Site]) -> Iterator[RemovableHandle]:
        """What hands the call on while a model is patched; each is registered when it is asked for."""
        yield from ()


def _by_keyword(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], source: str) -> FlexCall | None:
    return kwargs.get(CALL)


def _by_hand(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], source: str) -> FlexCall | None:
    call = held_in(module)
    return call if isinstance(call, FlexCall) else None


def _by_tag(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], source: str) -> FlexCall | None:
    if torch.compiler.is_compiling() and _thread.held is None and not module.training:
        return None  # no graph sees memory; there is a call in it that this thread does not hold in a recompute only
    states: Tensor | None = argument(module, args, kwargs, source)
    return None if states is None else getattr(states.untyped_storage(), CALL, None)


class Keyword(Carrier):
    """A keyword argument of the model's forward, which arrives at the attention; it may have to be prefixed."""

    find = staticmethod(_by_keyword)

    def __init__(self, prefix: str = "") -> None:
        self._name = prefix + CALL

    def run(self, forward: Callable[..., Any], call: FlexCall, inputs: Mapping[str, Any]) -> Any:
        return forward(**inputs, **{self._name: call})


class Held(Carrier):
    """Nothing: attention with code of its own looks for the call itself."""

    find = staticmethod(_by_hand)


class Door(Carrier):
    """A module below which keyword arguments arrive: it is handed the call when it is entered."""

    find = staticmethod(_by_keyword)

    def __init__(self, module: str) -> None:
        self._module = module

    def hooks(self, model: nn.Module, sites: Sequence[Site]) -> Iterator[RemovableHandle]:
        door = model.get_submodule(self._module)
        yield door.register_forward_pre_hook(partial(_hand_over, find=_by_hand), with_kwargs=True)


class Tag(Carrier):
    """The memory of the tensor that attention reads from, where a decoder drops all else on the way to it.

    It stays what it is on any way, also into a layer that gradient checkpointing runs again on detached tensors.
    """

    find = staticmethod(_by_tag)

    def __init__(self, decoder: str) -> None:
        self._decoder = decoder

    def hooks(self, model: nn.Module, sites: Sequence[Site]) -> Iterator[RemovableHandle]:
        decoder = model.get_submodule(self._decoder)
        yield decoder.register_forward_pre_hook(_tag, with_kwargs=True)
        yield decoder.register_forward_hook(_finish, with_kwargs=True)
        for site in sites:
            if not site.has_own_code:
                hook = partial(_hand_over, find=_by_tag, source=site.reads)
                yield site.attention.register_forward_pre_hook(hook, with_kwargs=True)


def _hand_over(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, find: Find, source: str = ""
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a module that the model has not handed the call to."""
    call = find(module, args, kwargs, source)
    return None if call is None else (args, kwargs | {CALL: call})


def _tag(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a decoder: what it reads from takes the call along.

    In a copy, since the encoder's output belongs to a whole generation, or to the user.
    """
    call: Any = held_in(decoder)
    if callable(call):  # a generate that calls its decoder past the model's forward
        call = call(kwargs)
        if call.patch.config.gate is not None:
            raise ConfigError("generate of this model asks its decoder past the gate; set gate=None.")
    if not isinstance(call, FlexCall):
        return None
    states: Tensor = kwargs["encoder_hidden_states"]
    tagged = states.clone()
    setattr(tagged.untyped_storage(), CALL, call)
    return args, kwargs | {"encoder_hidden_states": tagged}


def _finish(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of a decoder: a call that was made at its door ends here."""
    if callable(held_in(decoder)):
        call: FlexCall = getattr(kwargs["encoder_hidden_states"].untyped_storage(), CALL)
        call.finish(kwargs.get("past_key_values"))


def read_beside(site: Site, find: Find) -> RemovableHandle:
    """Let an attention module with code of its own read high-res tokens when ``find`` finds a call."""
    hook = partial(_read, index=site.index, source=site.reads, find=find)
    return site.attention.register_forward_hook(hook, with_kwargs=True)


def _read(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    *,
    index: int,
    source: str,
    find: Find,
) -> Any:
    call = find(module, args, kwargs, source)
    own: Tensor = output[0] if isinstance(output, tuple) else output
    read = own if call is None else _reading(module, args, kwargs, own, call, index)
    if module.training:
        read = reached(module, read)
    if read is own:
        return None
    return (read, *output[1:]) if isinstance(output, tuple) else read


def _reading(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], own: Tensor, call: FlexCall, index: int
) -> Tensor:
    """The output ``own`` of a module with the rows of a call changed that read."""
    given = {name: value for name, value in kwargs.items() if name != CALL}
    heads = HEADS[type(module).__name__](module, *args, **given)

    def attend(base: Tensor) -> Tensor:
        return call.attend(
            index,
            heads.query,
            heads.key,
            heads.value,
            heads.mask,
            base,
            scaling=heads.scaling,
        )

    if heads.project is None:
        return attend(rearrange(own, "b n (h d) -> b n h d", h=heads.query.shape[1])).flatten(2)
    base = scaled_dot_product_attention(heads.query, heads.key, heads.value, heads.mask, scale=heads.scaling)
    base = base.transpose(1, 2)
    merged = attend(base)
    changed = (merged != base).flatten(2).any(-1, keepdim=True)
    return torch.where(changed, heads.project(merged.flatten(2)), own)
