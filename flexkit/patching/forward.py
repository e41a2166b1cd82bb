"""The forward of a patched model: read the high-res inputs, run the model with a call, keep what later steps need."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from flexkit.attention.rows import QueryRows
from flexkit.errors import ConfigError
from flexkit.patching.call import FlexCall
from flexkit.patching.config_view import CALL
from flexkit.patching.gate import restore, snapshot, uncertain_positions
from flexkit.patching.methods import METHODS
from flexkit.patching.state import Patch, get_patch
from flexkit.patching.views import PREFIX, check_inputs, input_names

__all__ = ["base_forward", "forward", "place_images", "take_high_res"]


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``forward`` of a patched model: the model's own, extended by the high-res inputs."""
    if args:
        bound = inspect.signature(base_forward(self)).bind_partial(*args).arguments
        twice = sorted(bound.keys() & kwargs)
        if twice:
            raise TypeError(f"forward() got multiple values for {twice}.")
        kwargs = kwargs | bound
    return _forward(self, kwargs)


def signature_of(model: nn.Module) -> inspect.Signature:
    """The signature of a patched model's forward: generate checks its arguments, and Trainer picks columns, by it."""
    parameters = list(inspect.signature(base_forward(model)).parameters.values())
    tail = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    own = [
        parameter.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for parameter in parameters
        if parameter not in tail
    ]
    names = input_names(get_patch(model))
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    return inspect.Signature([*own, *added, *tail])


forward.signature_of = signature_of  # type: ignore[attr-defined]
METHODS["forward"] = forward


def place_images(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the text model: tell the call which rotary positions its images have."""
    call = kwargs.get(CALL)
    if call is not None:
        call.place(kwargs.get("position_ids"))


def base_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward that a model had before it was patched."""
    return get_patch(model).own_method(model, "forward")


def take_high_res(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the high-res inputs out of the arguments of a call; those that are None are not given."""
    high_res = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(PREFIX)}
    return {name: value for name, value in high_res.items() if value is not None}


def _forward(model: nn.Module, kwargs: dict[str, Any]) -> Any:
    patch = get_patch(model)
    high_res = take_high_res(kwargs)
    own = base_forward(model)
    base = partial(patch.geometry.run, own)
    call = None if patch.disabled else _prepare(model, patch, high_res, kwargs)
    if call is None:
        return own(**kwargs)
    if patch.config.gate is None or model.training:
        output = base(call, kwargs)
    else:
        call, output = _gated(base, call, patch.config.gate, kwargs)
    call.finish()
    cache = _cache_of(output, kwargs)
    if cache is not None:
        call.keep(cache)
    return output


def _prepare(model: nn.Module, patch: Patch, high_res: dict[str, Any], kwargs: dict[str, Any]) -> FlexCall | None:
    """The call that these inputs describe; None if they ask for the base model."""
    check_inputs(model, patch, high_res)
    return patch.geometry.prepare(model, patch, high_res, kwargs)


def _gated(base: Callable[..., Any], call: FlexCall, gate: float, kwargs: dict[str, Any]) -> tuple[FlexCall, Any]:
    """Answer in low resolution first; where that is uncertain, again with the high-res tokens."""
    cache = kwargs.get("past_key_values")
    saved = snapshot(cache)
    probe = call.querying(QueryRows(call.rows.mask & False))
    embeds = kwargs.get("inputs_embeds")
    # GIT adds positions to what it is given.
    output = base(probe, kwargs if embeds is None else kwargs | {"inputs_embeds": embeds.clone()})
    uncertain = uncertain_positions(_logits(output), kwargs.get("logits_to_keep", 0), call.length, gate)
    mask, shut = call.rows.mask & uncertain, QueryRows(call.rows.mask & ~uncertain)
    if not bool(mask.any()):
        probe.shut = shut
        return probe, output
    restore(cache, saved)
    call = call.querying(QueryRows(mask))
    call.shut = shut
    return call, base(call, kwargs)


def _logits(output: Any) -> Tensor:
    values = output if isinstance(output, tuple) else (getattr(output, "logits", None),)
    # A tuple may start with the loss.
    logits = next((value for value in values if isinstance(value, Tensor) and value.ndim == 3), None)
    if logits is None:
        raise ConfigError("a gate needs the logits of the model, and this one returns none; set gate to None.")
    return logits


def _cache_of(output: Any, kwargs: dict[str, Any]) -> Cache | None:
    values = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
    found = (value for value in (*values, kwargs.get("past_key_values")) if isinstance(value, Cache))
    return next(found, None)
