"""Attention over the base keys: who sees whom, and the fast kernel where it can say it."""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from flexkit.attention.core import attend, attention_logits

__all__ = ["base_attention", "key_mask"]


def key_mask(
    positions: Tensor,
    keys: int,
    *,
    is_causal: bool = True,
    sliding_window: int | None = None,
    mask: Tensor | None = None,
) -> Tensor | None:
    """Mask of the keys that some queries see: causal, in a window, and by a mask of the caller.

    Parameters
    ----------
    positions : torch.Tensor
        ``(batch or 1, queries)``, integer: where the queries stand in the sequence of keys.
    keys : int
        Length of that sequence.
    is_causal : bool
        Whether keys after a query are hidden.
    sliding_window : int, optional
        With ``is_causal``: a query sees the last so many keys, its own included.
    mask : torch.Tensor, optional
        ``(batch or 1, heads or 1, queries or 1, keys)``; bool (True attends) or additive.

    Returns
    -------
    torch.Tensor or None
        Broadcastable to ``(batch, heads, queries, keys)``, bool or additive as ``mask``; None if nothing is
        hidden.
    """
    if not is_causal:
        return mask
    distance = rearrange(positions, "b q -> b 1 q 1") - torch.arange(keys, device=positions.device)
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    if mask is None:
        return visible
    return visible & mask if mask.dtype == torch.bool else torch.where(visible, mask, -torch.inf)


def base_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention by torch's fused kernel, or from logits for a soft cap or sinks, which that lacks.

    Parameters
    ----------
    query : torch.Tensor
        ``(batch, heads, queries, head_dim)``, floating.
    key, value : torch.Tensor
        ``(batch, key_heads, keys, head_dim)``; ``heads`` is a multiple of ``key_heads``.
    scaling : float
        Factor on the products.
    mask : torch.Tensor, optional
        Broadcastable to ``(batch, heads, queries, keys)``; bool (True attends) or additive, hiding by minus
        infinity.
    is_causal : bool
        Instead of a mask: queries and keys are the same positions, each sees itself and those before.
    softcap : float, optional
        Logits are squashed to ``softcap * tanh(logits / softcap)`` before the mask.
    sinks : torch.Tensor, optional
        ``(heads,)`` logits of attention sinks.
    dropout : float
        Probability with which an attention weight is dropped.

    Returns
    -------
    torch.Tensor
        ``(batch, heads, queries, head_dim)`` in the dtype of ``query``; zero where every key is hidden.
    """
    if softcap is not None or sinks is not None:
        if is_causal:
            mask = key_mask(torch.arange(query.shape[2], device=query.device)[None], key.shape[2])
        logits = attention_logits(query, key, scaling=scaling, mask=mask, softcap=softcap)
        return attend(logits, value, sinks, dropout=dropout)[0].to(query.dtype)
    if mask is None:
        return _fused(query, key, value, None, scaling, is_causal, dropout)
    # A row without a key is NaN in some kernels: let it see all keys, then blank it.
    visible = mask if mask.dtype == torch.bool else mask != -torch.inf
    blind = ~visible.any(-1, keepdim=True)
    mask = mask | blind if mask.dtype == torch.bool else mask.masked_fill(blind, 0.0).to(query.dtype)
    return _fused(query, key, value, mask, scaling, False, dropout).masked_fill(blind, 0.0)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    is_causal: bool,
    dropout: float,
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=grouped,
    )
