"""The entropy gate: high-res tokens only where the low-res answer is uncertain."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from flexkit.patching.memory import cached_memory
from flexkit.patching.queries import kept_positions

__all__ = ["restore", "snapshot", "uncertain_positions"]


def uncertain_positions(logits: Tensor, logits_to_keep: int | Tensor, length: int, gate: float) -> Tensor:
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
    log_probabilities = torch.log_softmax(logits.detach().to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    entropy = torch.special.entr(log_probabilities.exp()).sum(-1)
    uncertain = torch.ones(len(logits), length, dtype=torch.bool, device=logits.device)
    uncertain[:, kept_positions(logits_to_keep, length).to(logits.device)] = entropy >= gate
    return uncertain


def snapshot(cache: object) -> list[Any] | None:
    """What a KV cache holds now; None without a cache."""
    if not isinstance(cache, Cache):
        return None
    if isinstance(cache, EncoderDecoderCache):
        return [snapshot(cache.self_attention_cache), snapshot(cache.cross_attention_cache), dict(cache.is_updated)]
    # Growing layers replace what they hold, so that can be shared, as a memory can; all others may write in place.
    memory = cached_memory(cache)
    shared = {} if memory is None else {id(memory): memory}
    return [
        copy.copy(layer) if isinstance(layer, DynamicLayer) else copy.deepcopy(layer, dict(shared))
        for layer in cache.layers
    ]


def restore(cache: object, layers: list[Any] | None) -> None:
    """Give a KV cache back what a :func:`snapshot` found in it."""
    if isinstance(cache, EncoderDecoderCache) and layers is not None:
        restore(cache.self_attention_cache, layers[0])
        restore(cache.cross_attention_cache, layers[1])
        cache.is_updated = dict(layers[2])
    elif isinstance(cache, Cache) and layers is not None:
        cache.layers[:] = layers
