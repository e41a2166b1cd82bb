"""The forward of a patched model: read the high-res inputs, run the model with a call, keep what later steps need."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from flexkit.attention.rows import QueryRows
from flexkit.errors import ConfigError, HighResInputError
from flexkit.patching.call import FlexCall
from flexkit.patching.config_view import CALL
from flexkit.patching.gate import restore, snapshot, uncertain_positions
from flexkit.patching.images import PREFIX, input_names, read_images
from flexkit.patching.memory import attach_memory, cached_memory
from flexkit.patching.queries import query_rows
from flexkit.patching.state import Patch, get_patch

__all__ = ["FORWARD", "make_forward", "place_images"]

FORWARD = "flexkit_forward"
"""Name of the forward that patching sets, by which unpatching knows it."""


def make_forward(signature: inspect.Signature, names: tuple[str, ...]) -> Callable[..., Any]:
    """A forward with the signature of the model's own, extended by the high-res inputs.

    Parameters
    ----------
    signature : inspect.Signature
        Of the bound forward: without ``self``.
    names : tuple of str
        The arguments to add.
    """
    own = list(signature.parameters.values())

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(*args)
        twice = sorted(bound.arguments.keys() & kwargs)
        if twice:
            raise TypeError(f"forward() got multiple values for {twice}.")
        return _forward(self, kwargs | bound.arguments)

    # generate checks its arguments against the signature, and Trainer picks dataset columns by it.
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    tail = [parameter for parameter in own if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    owner = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    body = [
        parameter.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for parameter in own if parameter not in tail
    ]
    forward.__signature__ = inspect.Signature([owner, *body, *added, *tail])  # type: ignore[attr-defined]
    forward.__name__ = FORWARD
    return forward


def place_images(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the text model: tell the call which rotary positions its images have."""
    call = kwargs.get(CALL)
    if call is not None:
        call.place(kwargs.get("position_ids"))


def _forward(model: nn.Module, kwargs: dict[str, Any]) -> Any:
    patch = get_patch(model)
    high_res = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(PREFIX)}
    high_res = {name: value for name, value in high_res.items() if value is not None}
    base = patch.earlier_forward or partial(type(model).forward, model)
    call = None if patch.disabled else _prepare(model, patch, high_res, kwargs)
    if call is None:
        return base(**kwargs)
    if patch.config.gate is None or model.training:
        output = base(**kwargs, **{CALL: call})
    else:
        call, output = _gated(base, call, patch.config.gate, kwargs)
    call.check_visited(call.patch.layers)
    cache = _cache_of(output, kwargs)
    if cache is not None:
        attach_memory(cache, call.memory)
    for record in patch.recorders:
        record(call)
    return output


def _prepare(model: nn.Module, patch: Patch, high_res: dict[str, Any], kwargs: dict[str, Any]) -> FlexCall | None:
    """The call that these inputs describe; None if they ask for the base model."""
    unknown = sorted(set(high_res) - set(input_names(patch)))
    if unknown:
        raise HighResInputError(
            f"{type(model).__name__} takes no {unknown}; its high-res inputs are {list(input_names(patch))}."
        )
    cache = kwargs.get("past_key_values")
    past = _length(cache)
    memory = cached_memory(cache)
    if memory is not None and isinstance(past, int):
        memory = memory.within(past)
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None or (memory is None and not high_res):
        return None
    batch, length = tokens.shape[:2]
    repeats = high_res.pop("hd_repeats", 1)
    queries = high_res.pop("hd_queries", None)
    prompt = high_res.pop("hd_image_tokens", None)
    if high_res and prompt is not None:
        memory = memory or read_images(model, patch, high_res, prompt, kwargs, past=0, repeats=repeats)
        if queries is not None and isinstance(past, int):
            queries = queries[:, : past + length]  # the rest is named for later chunks
    elif high_res:
        image_tokens = patch.geometry.image_tokens(model, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        # Generate hands the same views in at every step; once read they are in the memory. It may also decode a token
        # that happens to be the image token: an image comes with its low-res view, or with features made of it.
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        is_new = encoded is not None or kwargs.get(patch.geometry.inputs[0]) is not None
        if memory is None or (is_new and bool(image_tokens.any())):
            new = read_images(model, patch, high_res, image_tokens, kwargs, past=int(past), repeats=repeats)
            memory = new if memory is None else memory.joined(new)
    if memory is None:
        raise HighResInputError("hd_queries were given without a high-res view.")
    if memory.batch != batch:
        raise HighResInputError(
            f"the KV cache holds high-res tokens of {memory.batch} rows, the inputs have {batch}; change the batch of "
            "a cache with its own methods (batch_repeat_interleave, batch_select_indices)."
        )
    rows = query_rows(patch.config, kwargs, memory, queries, past=past, length=length, repeats=repeats)
    return FlexCall(patch, memory, rows, past, keep_projected=not model.training, records=bool(patch.recorders))


def _length(cache: Any) -> int | Tensor:
    """Positions that a cache holds: a number, but a tensor while compiling a static cache, whose graphs serve all."""
    length = cache.get_seq_length() if cache is not None else 0
    if isinstance(length, Tensor) and torch.compiler.is_compiling():
        return length.clone()  # the cache counts on in place
    return int(length)


def _gated(base: Callable[..., Any], call: FlexCall, gate: float, kwargs: dict[str, Any]) -> tuple[FlexCall, Any]:
    """Answer in low resolution first; where that is uncertain, again with the high-res tokens."""
    cache = kwargs.get("past_key_values")
    saved = snapshot(cache)
    probe = call.querying(QueryRows(call.rows.mask & False))
    output = base(**kwargs, **{CALL: probe})
    uncertain = uncertain_positions(_logits(output), kwargs.get("logits_to_keep", 0), call.length, gate)
    mask = call.rows.mask & uncertain
    if not bool(mask.any()):
        return probe, output
    restore(cache, saved)
    call = call.querying(QueryRows(mask))
    return call, base(**kwargs, **{CALL: call})


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
