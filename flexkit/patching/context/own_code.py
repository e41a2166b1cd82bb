"""Attention that transformers' AttentionInterface does not run: its queries, keys and values, made once more.

The output of a module stays its own; only the rows that read high-res tokens are changed behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import linear
from transformers.cache_utils import EncoderDecoderCache

__all__ = ["HEADS", "Heads"]


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


HEADS: dict[str, Callable[..., Heads]] = {
    "AriaCrossAttention": _aria,
    "BlipTextSelfAttention": _blip,
    "GitSelfAttention": _git,
    "IdeficsPerceiverAttention": _perceiver,
    "TrOCRAttention": _trocr,
}
"""By the class of the module; of each nothing is repeated but how it makes queries, keys and values."""
