"""The forward of a patched model: read the high-res inputs, run the model with a call, keep what later steps need."""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from flexkit.attention.ragged import RaggedIndex
from flexkit.errors import ConfigError
from flexkit.patching.call.call import FlexCall
from flexkit.patching.call.inputs import check_inputs, input_names, kept_positions
from flexkit.patching.call.route import Prompt
from flexkit.patching.call.runs import entropy_of
from flexkit.patching.geometry.base import PREFIX
from flexkit.patching.memory.high_res import cached_memory, layers_of
from flexkit.patching.seam.config_view import CALL, PROMPT
from flexkit.patching.state import Patch, get_patch

__all__ = ["base_forward", "forward", "place_images", "take_high_res"]


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``forward`` of a patched model: the model's own, extended by the high-res inputs."""
    if args:
        bound = inspect.signature(base_forward(self)).bind_partial(*args).arguments
        twice = sorted(bound.keys() & kwargs)
        if twice:
            raise TypeError(f"forward() got multiple values for {twice}.")
        kwargs = kwargs | bound
    patch = get_patch(self, here=True)
    own, route = patch.own_method(self, "forward"), patch.route
    high_res, prompt = take_high_res(patch, kwargs)
    call = None
    if not patch.disabled:
        check_inputs(self, patch, high_res)
        call = route.prepare(self, patch, high_res, kwargs, prompt)
    if call is None:
        return own(**kwargs)
    base = partial(route.run, own)
    if isinstance(call, FlexCall) and call.gate is not None:
        call, output = _gated(base, call, call.gate, kwargs)
    else:
        if isinstance(call, FlexCall) and call.memory.is_settled:
            layers = layers_of(kwargs.get("past_key_values"), (DynamicLayer,))
            # What a call appends to such a cache can be taken away, if it turns out that something was missing.
            call.asks = layers is None or any(layer.keys.shape[-2] != call.past for layer in layers)
        output = base(call, kwargs)
        if isinstance(call, FlexCall) and call.noted:
            wanted, there = (torch.stack(masks) for masks in zip(*call.noted, strict=True))
            if bool((wanted > there).any()):  # one wait
                kwargs["past_key_values"].crop(-call.rows.mask.shape[1])
                call = call.querying(call.rows.mask, asks=True)
                output = base(call, kwargs)
    given = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
    caches = (each for each in (*given, kwargs.get("past_key_values")) if isinstance(each, Cache))
    call.finish(next(caches, None))
    return output


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


def place_images(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the text model: note the rotary positions ``([axes,] batch, length)`` that images have."""
    call = kwargs.get(CALL)
    if not isinstance(call, FlexCall):
        return
    memory, length = call.memory, call.rows.mask.shape[1]
    if isinstance(call.past, int) and all(span.end <= call.past for span in memory.images) and memory.in_sequence:
        memory.seen = call.past + length  # all are in their place
        return
    position_ids = kwargs.get("position_ids")
    if position_ids is None:
        position_ids = call.past + torch.arange(length, device=call.rows.mask.device)[None]
    if position_ids.ndim == 2:
        position_ids = position_ids[None]
    rope = getattr(getattr(decoder, "config", None), "rope_parameters", None) or {}
    if len(position_ids) > (len(rope.get("mrope_section", ())) or 3):
        position_ids = position_ids[1:]  # the first axis, of the text, only serves the masks
    memory.place(position_ids.expand(-1, memory.batch, -1), call.past)


def base_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward that a model had before it was patched."""
    return get_patch(model).own_method(model, "forward")


def take_high_res(patch: Patch, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Prompt | None]:
    """Take high-res inputs, and what ``generate`` noted, out of a call's arguments; inputs that are None are none.

    Pictures beside them get the model's dtype: what serves a model hands on what processors make, which is float32.
    """
    taken = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(PREFIX)}
    high_res = {name: value for name, value in taken.items() if value is not None}
    pictures = set()
    for geometry in patch.views if high_res else ():
        pictures |= {geometry.inputs[0], PREFIX + geometry.inputs[0], *geometry.pixels}
    for given in (kwargs, high_res):
        for name in pictures & given.keys():
            if isinstance(given[name], Tensor) and given[name].is_floating_point():
                given[name] = given[name].to(patch.model.dtype)
    return high_res, kwargs.pop(PROMPT, None)


def _gated(base: Callable[..., Any], call: FlexCall, gate: float, kwargs: dict[str, Any]) -> tuple[FlexCall, Any]:
    """Answer in low resolution first; where that is uncertain, again with the high-res tokens."""
    cache = kwargs.get("past_key_values")
    saved = _snapshot(cache)
    probe = call.querying(call.rows.mask & False)
    embeds = kwargs.get("inputs_embeds")
    # GIT adds positions to what it is given.
    output = base(probe, kwargs if embeds is None else kwargs | {"inputs_embeds": embeds.clone()})
    uncertain = _uncertain_positions(_logits(output), kwargs.get("logits_to_keep", 0), call.rows.mask.shape[1], gate)
    mask, shut = call.rows.mask & uncertain, RaggedIndex(call.rows.mask & ~uncertain)
    if not bool(mask.any()):
        probe.shut = shut
        return probe, output
    _restore(cache, saved)
    call = call.querying(mask)
    call.shut = shut
    return call, base(call, kwargs)


def _logits(output: Any) -> Tensor:
    values = output if isinstance(output, tuple) else (getattr(output, "logits", None),)
    # A tuple may start with the loss.
    logits = next((value for value in values if isinstance(value, Tensor) and value.ndim == 3), None)
    if logits is None:
        raise ConfigError("a gate needs the logits of the model, and this one returns none; set gate to None.")
    return logits


def _uncertain_positions(logits: Tensor, logits_to_keep: int | Tensor, length: int, gate: float) -> Tensor:
    """``(batch, length)``, bool: positions whose next-token entropy is at least ``gate`` nats, or unknown.

    Parameters
    ----------
    logits : torch.Tensor
        ``(batch, kept, vocabulary)`` of the base model.
    logits_to_keep : int or torch.Tensor
        Which positions' logits these are, as the model was asked.
    length : int
        Number of positions of the call.
    gate : float
        The bound, in nats.
    """
    entropy = entropy_of(logits)
    uncertain = torch.ones(len(logits), length, dtype=torch.bool, device=logits.device)
    uncertain[:, kept_positions(logits_to_keep, length).to(logits.device)] = entropy >= gate
    return uncertain


def _snapshot(cache: object) -> list[Any] | None:
    """What a KV cache holds now; None without a cache."""
    if not isinstance(cache, Cache):
        return None
    if isinstance(cache, EncoderDecoderCache):
        return [_snapshot(cache.self_attention_cache), _snapshot(cache.cross_attention_cache), dict(cache.is_updated)]
    # Growing layers replace what they hold, so that can be shared, as a memory can; all others may write in place.
    memory = cached_memory(cache)
    shared = {} if memory is None else {id(memory): memory}
    return [
        copy.copy(layer) if isinstance(layer, DynamicLayer) else copy.deepcopy(layer, dict(shared))
        for layer in cache.layers
    ]


def _restore(cache: object, layers: list[Any] | None) -> None:
    """Give a KV cache back what a :func:`_snapshot` found in it."""
    if isinstance(cache, EncoderDecoderCache) and layers is not None:
        _restore(cache.self_attention_cache, layers[0])
        _restore(cache.cross_attention_cache, layers[1])
        cache.is_updated = dict(layers[2])
    elif isinstance(cache, Cache) and layers is not None:
        cache.layers[:] = layers
