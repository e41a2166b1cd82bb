"""Attention that transformers' AttentionInterface does not run: its queries, keys and values, made once more.

The output of a module stays its own; only the rows that read high-res tokens are changed behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import EncoderDecoderCache

from flexkit.patching.config_view import CALL
from flexkit.patching.projection import reached

if TYPE_CHECKING:
    from flexkit.patching.call import FlexCall
    from flexkit.patching.context.carriers import Find
    from flexkit.patching.context.sites import Site

__all__ = ["READERS", "Heads", "read_beside"]


@dataclass(frozen=True)
class Heads:
    """What a module computes attention of; each tensor ``(batch, heads, length, head_dim)``."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    scaling: float | None = None
    project: Callable[[Tensor], Tensor] | None = None
    """What stands between the attention and the module's output."""


def _split(states: Tensor, heads: int) -> Tensor:
    return rearrange(states, "b n (h d) -> b h n d", h=heads)


def _git(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> Heads:
    query, key, value = (
        _split(made(hidden_states), module.num_attention_heads) for made in (module.query, module.key, module.value)
    )
    if past_key_values is not None:  # the module has put them there already
        layer = past_key_values.layers[module.layer_idx]
        key, value = layer.keys, layer.values
    return Heads(query, key, value, attention_mask)


def _cross(module: Any, cache: object, states: Tensor | None, heads: int, names: tuple[str, str]) -> list[Tensor]:
    """Keys and values of an encoder's output, which a cache holds from the first call on."""
    if isinstance(cache, EncoderDecoderCache):
        layer: Any = cache.cross_attention_cache.layers[module.layer_idx]
        return [layer.keys, layer.values]
    return [_split(getattr(module, name)(states), heads) for name in names]


def _blip(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> Heads:
    heads = module.num_attention_heads
    key, value = _cross(module, past_key_values, encoder_hidden_states, heads, ("key", "value"))
    return Heads(_split(module.query(hidden_states), heads), key, value, attention_mask)


def _trocr(
    module: Any,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Heads:
    query = _split(module.q_proj(hidden_states) * module.scaling, module.num_heads)
    key, value = _cross(module, past_key_values, key_value_states, module.num_heads, ("k_proj", "v_proj"))
    return Heads(query, key, value, attention_mask, 1.0, module.out_proj)


def _aria(
    module: Any, key_value_states: Tensor, hidden_states: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Heads:
    inner, states = module.multihead_attn, module.layer_norm_kv(key_value_states)
    made = (module.q_proj(module.layer_norm(hidden_states)), module.k_proj(states), module.v_proj(states))
    weights, biases = inner.in_proj_weight.chunk(3), inner.in_proj_bias.chunk(3)
    query, key, value = (
        _split(linear(states, weight, bias), inner.num_heads)
        for states, weight, bias in zip(made, weights, biases, strict=True)
    )
    mask = None if attn_mask is None else ~attn_mask.view(len(query), inner.num_heads, *attn_mask.shape[1:])
    return Heads(query, key, value, mask, None, lambda read: module.dropout(module.linear(inner.out_proj(read))))


def _perceiver(module: Any, context: Tensor, latents: Tensor) -> Heads:
    own = module.latents_layer_norm(latents)
    states = torch.cat([module.context_layer_norm(context), own], dim=1)
    query, key, value = (
        _split(made, module.n_heads) for made in (module.q_proj(own), module.k_proj(states), module.v_proj(states))
    )
    if module.qk_layer_norms:
        query, key = module.q_layer_norm(query), module.k_layer_norm(key)
    return Heads(query, key, value, None, module.qk_scale, module.output_proj)


READERS: dict[str, Callable[..., Heads]] = {
    "AriaCrossAttention": _aria,
    "BlipTextSelfAttention": _blip,
    "GitSelfAttention": _git,
    "IdeficsPerceiverAttention": _perceiver,
    "TrOCRAttention": _trocr,
}
"""By the class of the module; of each nothing is repeated but how it makes queries, keys and values."""


def read_beside(site: "Site", find: "Find") -> RemovableHandle:
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
    find: "Find",
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
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], own: Tensor, call: "FlexCall", index: int
) -> Tensor:
    """The output ``own`` of a module with the rows of a call changed that read."""
    given = {name: value for name, value in kwargs.items() if name != CALL}
    heads = READERS[type(module).__name__](module, *args, **given)

    def attend(base: Tensor) -> Tensor:
        return call.attend(
            index,
            heads.query,
            heads.key,
            heads.value,
            heads.mask,
            base,
            scaling=heads.scaling,
            softcap=None,
            sinks=None,
            position_bias=None,
            is_causal=False,
            sliding_window=None,
            dropout=0.0,
        )

    if heads.project is None:
        return attend(rearrange(own, "b n (h d) -> b n h d", h=heads.query.shape[1])).flatten(2)
    base = scaled_dot_product_attention(heads.query, heads.key, heads.value, heads.mask, scale=heads.scaling)
    base = base.transpose(1, 2)
    merged = attend(base)
    changed = (merged != base).flatten(2).any(-1, keepdim=True)
    return torch.where(changed, heads.project(merged.flatten(2)), own)
