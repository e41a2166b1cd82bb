"""How a call reaches the attention that reads: by keyword, or across the gaps where a model drops keywords."""

import inspect
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexkit.errors import ConfigError
from flexkit.patching.call import FlexCall
from flexkit.patching.config_view import CALL
from flexkit.patching.context.sites import Site

__all__ = ["Carrier", "Door", "Held", "Keyword", "Tag", "argument", "carried", "held"]

Find = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], str], FlexCall | None]
"""The call that a reading module got: of the module, what it is called with, and the name of its source argument."""

_held: ContextVar[object] = ContextVar("flexkit_held", default=None)


@contextmanager
def carried(value: object) -> Iterator[None]:
    """Hold a call, or what a call can be made of, while the block runs; other threads do not see it."""
    token = _held.set(value)
    try:
        yield
    finally:
        _held.reset(token)


def held() -> object:
    """What is carried now."""
    return _held.get()


def argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """One argument of a module's call, however it was passed."""
    return inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments.get(name)


class Carrier(ABC):
    """One way."""

    find: Find

    def keywords(self, call: FlexCall) -> Mapping[str, FlexCall]:
        """What the model's forward is called with besides its inputs."""
        return {}

    def hooks(self, model: nn.Module, sites: Sequence[Site]) -> list[RemovableHandle]:
        """What hands the call on while a model is patched."""
        return []


def _by_keyword(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], source: str) -> FlexCall | None:
    return kwargs.get(CALL)


def _by_hand(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], source: str) -> FlexCall | None:
    call = held()
    return call if isinstance(call, FlexCall) else None


def _by_tag(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], source: str) -> FlexCall | None:
    return getattr(argument(module, args, kwargs, source), CALL, None)


class Keyword(Carrier):
    """A keyword argument of the model's forward, which arrives at the attention; it may have to be prefixed."""

    find = staticmethod(_by_keyword)

    def __init__(self, prefix: str = "") -> None:
        self._name = prefix + CALL

    def keywords(self, call: FlexCall) -> Mapping[str, FlexCall]:
        return {self._name: call}


class Held(Carrier):
    """Nothing: attention with code of its own looks for the call itself."""

    find = staticmethod(_by_hand)


class Door(Carrier):
    """A module below which keyword arguments arrive: it is handed the call when it is entered."""

    find = staticmethod(_by_keyword)

    def __init__(self, module: str) -> None:
        self._module = module

    def hooks(self, model: nn.Module, sites: Sequence[Site]) -> list[RemovableHandle]:
        door = model.get_submodule(self._module)
        return [door.register_forward_pre_hook(partial(_hand_over, find=_by_hand), with_kwargs=True)]


class Tag(Carrier):
    """The tensor that attention reads from, where a decoder drops all else on the way to it.

    A tensor is handed on as it is, also to a layer that gradient checkpointing runs again.
    """

    find = staticmethod(_by_tag)

    def __init__(self, decoder: str) -> None:
        self._decoder = decoder

    def hooks(self, model: nn.Module, sites: Sequence[Site]) -> list[RemovableHandle]:
        decoder = model.get_submodule(self._decoder)
        readers = [site for site in sites if not site.has_own_code]
        return [
            decoder.register_forward_pre_hook(_tag, with_kwargs=True),
            decoder.register_forward_hook(_finish, with_kwargs=True),
            *(
                site.attention.register_forward_pre_hook(
                    partial(_hand_over, find=_by_tag, source=site.reads), with_kwargs=True
                )
                for site in readers
            ),
        ]


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

    On a new view of it, since the encoder's output belongs to a whole generation, or to the user.
    """
    call = held()
    if callable(call):  # a generate that calls its decoder past the model's forward
        call = call(kwargs)
        if call.patch.config.gate is not None:
            raise ConfigError("generate of this model asks its decoder past the gate; set gate=None.")
    if not isinstance(call, FlexCall):
        return None
    states: Tensor = kwargs["encoder_hidden_states"]
    tagged = states.view_as(states)
    setattr(tagged, CALL, call)
    return args, kwargs | {"encoder_hidden_states": tagged}


def _finish(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of a decoder: a call that was made at its door ends here."""
    if callable(held()):
        call: FlexCall = getattr(kwargs["encoder_hidden_states"], CALL)
        call.finish()
        call.keep(kwargs.get("past_key_values"))
