r"""Hierarchical self-attention as functions: one joint softmax over base keys and selected high-res keys.

For a querying row the paper (section 3.2) computes

.. math:: \mathrm{softmax}\!\left(\frac{q\,[K ; K'_S]^\top}{\sqrt{d_k}}\right) [V ; V'_S].

A softmax over two sets of keys is the mean of the two softmaxes, weighted by the sums of their exponentials.
So the base model's own kernel may compute the base part, and only the high-res part and the two log-sum-exps
are computed here.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

__all__ = ["attend", "attention_logits", "attention_map", "log_normaliser", "merge_high_res"]


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
    grouped = rearrange(query.to(dtype) * scaling, "b (h g) q d -> b h (g q) d", h=key.shape[1])
    logits = grouped @ key.to(dtype).transpose(-1, -2)
    logits = rearrange(logits, "b h (g q) n -> b (h g) q n", g=query.shape[1] // key.shape[1])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + bias
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -torch.inf)
    # Additive masks hide a key with the lowest finite number of their dtype; -inf is exact in every dtype.
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return (logits + mask.to(dtype)).masked_fill(hidden, -torch.inf)


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
    _, total, peak = _exponentials(logits)
    return _log(total) + peak


def attention_map(logits: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax attention of each query, all zero for a query that sees no key.

    Parameters
    ----------
    logits : torch.Tensor
        ``(batch, heads, queries, keys)`` from :func:`attention_logits`.
    sinks : torch.Tensor, optional
        ``(heads,)`` logits of attention sinks.

    Returns
    -------
    torch.Tensor
        ``(batch, heads, queries, keys)``, at least 0, summing to 1 (or less, by what a sink takes).
    """
    normaliser = log_normaliser(logits, sinks)
    return torch.exp(logits - normaliser.masked_fill(normaliser == -torch.inf, 0.0))


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
    weights = torch.exp(logits - normaliser.masked_fill(normaliser == -torch.inf, 0.0))
    weights = F.dropout(weights, dropout)
    grouped = rearrange(weights, "b (h g) q n -> b h (g q) n", h=value.shape[1])
    output = grouped @ value.to(weights.dtype)
    return rearrange(output, "b h (g q) d -> b (h g) q d", g=logits.shape[1] // value.shape[1]), normaliser


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
    high_res, normaliser = attend(logits.masked_fill(~selected, -torch.inf), value, dropout=dropout)
    share = torch.sigmoid(normaliser - base_normaliser.masked_fill(normaliser == -torch.inf, 0.0))
    visible = base_normaliser != -torch.inf
    joint = base.to(share.dtype).masked_fill(~visible, 0.0) * (1 - share) + high_res * share
    return torch.where(selected.any(-1, keepdim=True), joint.to(base.dtype), base)


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exponentials relative to each query's largest logit, their sum, and that logit (0 if all masked)."""
    if logits.shape[-1] == 0:
        zero = logits.new_zeros(*logits.shape[:-1], 1)
        return logits, zero, zero
    peak = logits.detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    weights = torch.exp(logits - peak)
    return weights, weights.sum(-1, keepdim=True), peak


def _log(total: Tensor) -> Tensor:
    """Log whose gradient at zero is zero."""
    empty = total == 0
    return torch.log(total.masked_fill(empty, 1.0)).masked_fill(empty, -torch.inf)
