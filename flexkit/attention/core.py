r"""Hierarchical self-attention as functions: one joint softmax over base keys and selected high-res keys.

For a querying row the paper (section 3.2) computes

.. math:: \mathrm{softmax}\!\left(\frac{q\,[K ; K'_S]^\top}{\sqrt{d_k}}\right) [V ; V'_S].

A softmax over two sets of keys is the mean of the two softmaxes, weighted by the sums of their exponentials.
So the base model's own kernel may compute the base part, and only the high-res part and the two log-sum-exps
are computed here.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from flexkit.attention.kernels import products
from flexkit.attention.visible import hidden_keys

__all__ = [
    "attend",
    "attention_logits",
    "attention_map",
    "joint_attention",
    "log_normaliser",
    "merge_high_res",
]


def attention_logits(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | float = 0.0,
) -> Tensor:
    """Masked attention logits in float32 or better, for any number of query heads per key head.

    Parameters
    ----------
    query : torch.Tensor
        ``(batch, heads, queries, head_dim)``, floating.
    key : torch.Tensor
        ``(batch, key_heads, keys, head_dim)``; ``heads`` is a multiple of ``key_heads`` (GQA, MQA).
    scaling : float
        Factor on the products, usually ``head_dim ** -0.5``.
    mask : torch.Tensor, optional
        Broadcastable to ``(batch, heads, queries, keys)``; bool (True attends) or additive.
    softcap : float, optional
        Logits are squashed to ``softcap * tanh(logits / softcap)`` before the mask.
    bias : torch.Tensor or float
        Added to the logits after the cap, broadcastable to their shape.

    Returns
    -------
    torch.Tensor
        ``(batch, heads, queries, keys)``; minus infinity where masked.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = products(query.to(dtype) * scaling, key.to(dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(bias, Tensor) or bias:
        logits = logits + bias
    if mask is None:
        return logits
    if mask.dtype != torch.bool:
        logits = logits + mask.to(dtype)
    return logits.masked_fill(hidden_keys(mask), -torch.inf)


def log_normaliser(logits: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Log of the softmax denominator of each query.

    Parameters
    ----------
    logits : torch.Tensor
        ``(batch, heads, queries, keys)``.
    sinks : torch.Tensor, optional
        ``(heads,)`` or ``(batch, heads, queries, 1)``: logits of the attention sinks, keys without a value.

    Returns
    -------
    torch.Tensor
        ``(batch, heads, queries, 1)``; minus infinity where every key is masked.
    """
    if sinks is not None:
        sinks = sinks if sinks.ndim == 4 else sinks.view(1, -1, 1, 1)
        sink = sinks.to(logits.dtype).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], dim=-1)
    if not logits.requires_grad:
        return torch.logsumexp(logits, dim=-1, keepdim=True)
    # Its gradient is NaN where every key is masked.
    blind = (logits == -torch.inf).all(-1, keepdim=True)
    return torch.logsumexp(logits.masked_fill(blind, 0.0), dim=-1, keepdim=True).masked_fill(blind, -torch.inf)


def attention_map(logits: Tensor, sinks: Tensor | None = None, *, normaliser: Tensor | None = None) -> Tensor:
    """Softmax attention of each query, all zero for a query that sees no key.

    Parameters
    ----------
    logits : torch.Tensor
        ``(batch, heads, queries, keys)`` from :func:`attention_logits`.
    sinks : torch.Tensor, optional
        ``(heads,)`` logits of attention sinks.
    normaliser : torch.Tensor, optional
        What :func:`log_normaliser` gives for both, where it is known.

    Returns
    -------
    torch.Tensor
        ``(batch, heads, queries, keys)``, at least 0, summing to 1 (or less, by what a sink takes).
    """
    normaliser = log_normaliser(logits, sinks) if normaliser is None else normaliser
    # Next to the lowest finite number every logit is infinitely larger, or itself minus infinity.
    return torch.exp(logits - normaliser.clamp_min(torch.finfo(normaliser.dtype).min))


def attend(
    logits: Tensor, value: Tensor, sinks: Tensor | None = None, *, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Softmax attention from logits, and its log-normaliser, finite also where every key is masked.

    Parameters
    ----------
    logits : torch.Tensor
        ``(batch, heads, queries, keys)``.
    value : torch.Tensor
        ``(batch, key_heads, keys, value_dim)``.
    sinks : torch.Tensor, optional
        ``(heads,)`` logits of attention sinks.
    dropout : float
        Probability with which an attention weight is dropped.

    Returns
    -------
    output : torch.Tensor
        ``(batch, heads, queries, value_dim)`` in the dtype of ``logits``; zero where every key is masked.
    normaliser : torch.Tensor
        ``(batch, heads, queries, 1)``, as :func:`log_normaliser`.
    """
    normaliser = log_normaliser(logits, sinks)
    return _weighted(attention_map(logits, normaliser=normaliser), value, dropout), normaliser


def merge_high_res(
    base: Tensor,
    base_normaliser: Tensor,
    logits: Tensor,
    value: Tensor,
    selected: Tensor,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Extend attention over base keys to the joint softmax over base and selected high-res keys.

    Parameters
    ----------
    base : torch.Tensor
        ``(batch, heads, queries, value_dim)``: attention of the querying rows over the base keys, from any
        kernel.
    base_normaliser : torch.Tensor
        ``(batch, heads, queries, 1)``: its log-normaliser.
    logits : torch.Tensor
        ``(batch, heads, queries, tokens)``: logits of all high-res tokens.
    value : torch.Tensor
        ``(batch, key_heads, tokens, value_dim)``: V' of all high-res tokens.
    selected : torch.Tensor
        ``(batch, queries, tokens)``, bool: the tokens that each querying row reads.
    dropout : float
        Probability with which a high-res attention weight is dropped.

    Returns
    -------
    torch.Tensor
        ``(batch, heads, queries, value_dim)`` in the dtype of ``base``. Rows that select nothing keep the
        bits of ``base``.
    """
    selected = selected[:, None]
    # To the high-res tokens, all base keys together are one key more.
    base_logit = base_normaliser.clamp_min(torch.finfo(base_normaliser.dtype).min)
    both = torch.cat([logits.masked_fill(~selected, -torch.inf), base_logit], dim=-1)
    weights, share = torch.split(torch.softmax(both, dim=-1), [logits.shape[-1], 1], dim=-1)
    base_part = base.masked_fill(base_normaliser == -torch.inf, 0.0).to(share.dtype) * share
    joint = base_part + _weighted(weights, value, dropout)
    return torch.where(selected.any(-1, keepdim=True), joint.to(base.dtype), base)


def joint_attention(
    base: Tensor,
    base_logits: Tensor,
    base_value: Tensor,
    logits: Tensor,
    value: Tensor,
    selected: Tensor,
    *,
    replaced: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    normaliser: Tensor | None = None,
) -> Tensor:
    """Attention of the querying rows over base keys and selected high-res keys (paper, section 3.2).

    Parameters
    ----------
    base : torch.Tensor
        ``(batch, heads, queries, value_dim)``: their attention over the base keys alone, from any kernel.
    base_logits : torch.Tensor
        ``(batch, heads, queries, keys)``: the logits of that attention.
    base_value : torch.Tensor
        ``(batch, key_heads, keys, value_dim)``.
    logits : torch.Tensor
        ``(batch, heads, queries, tokens)``: logits of the high-res tokens.
    value : torch.Tensor
        ``(batch, key_heads, tokens, value_dim)``: V' of the high-res tokens.
    selected : torch.Tensor
        ``(batch, queries, tokens)``, bool: the tokens that each querying row reads.
    replaced : torch.Tensor, optional
        ``(batch, queries, keys)``, bool: base keys that a row gives up, if it selects anything.
    sinks : torch.Tensor, optional
        ``(heads,)`` logits of attention sinks.
    dropout : float
        Probability with which an attention weight is dropped.
    normaliser : torch.Tensor, optional
        ``(batch, heads, queries, 1)``: what :func:`log_normaliser` gives for the base logits and sinks, where it is
        known.

    Returns
    -------
    torch.Tensor
        ``(batch, heads, queries, value_dim)`` in the dtype of ``base``. Rows that select nothing keep the
        bits of ``base``.
    """
    if replaced is None:
        normaliser = log_normaliser(base_logits, sinks) if normaliser is None else normaliser
    else:
        left = base_logits.masked_fill(replaced[:, None], -torch.inf)
        rest, normaliser = attend(left, base_value, sinks, dropout=dropout)
        base = torch.where(selected.any(-1)[:, None, :, None], rest.to(base.dtype), base)
    return merge_high_res(base, normaliser, logits, value, selected, dropout=dropout)


def _weighted(weights: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Means of values, for any number of query heads per key head."""
    if dropout:
        weights = F.dropout(weights, dropout)
    return products(weights, value.to(weights.dtype).transpose(-1, -2))
