"""Plain self-attention: the fast kernel where it can say it, projections, norms, positions, cache, who sees whom."""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from flexkit.attention.core import attend, attention_logits
from flexkit.attention.rotary import rotate
from flexkit.attention.validation import broadcast_mask, check_dense, check_pair_of_tensors, check_tensor
from flexkit.attention.visible import key_mask
from flexkit.errors import ConfigError

__all__ = ["PlainSelfAttention", "Tables", "base_attention", "check_settings"]

Tables = tuple[Tensor, Tensor]


def check_settings(*conditions: tuple[bool, str]) -> None:
    """Raise :class:`ConfigError` with the message of the first condition that does not hold."""
    for holds, message in conditions:
        if not holds:
            raise ConfigError(message)


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


class PlainSelfAttention(nn.Module):
    """What :class:`HierarchicalSelfAttention`, which documents the settings, has besides high-res."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        *,
        bias: bool,
        qk_norm: bool,
        softcap: float | None,
        sinks: bool,
        sliding_window: int | None,
        is_causal: bool,
        scaling: float | None,
        dropout: float,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_settings(
            (min(dim, num_heads, num_kv_heads) >= 1, "dim and the numbers of heads must be positive."),
            (
                num_heads % max(num_kv_heads, 1) == 0,
                f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}.",
            ),
            (
                head_dim is not None or dim % max(num_heads, 1) == 0,
                f"num_heads={num_heads} does not divide dim={dim}: give head_dim.",
            ),
            (head_dim is None or head_dim >= 1, f"head_dim must be positive, got {head_dim}."),
            (softcap is None or softcap > 0, f"softcap must be above 0, got {softcap}."),
            (
                sliding_window is None or sliding_window >= 1,
                f"sliding_window must be positive, got {sliding_window}.",
            ),
            (
                sliding_window is None or is_causal,
                "a sliding window is causal: drop it, or set is_causal=True.",
            ),
            (0.0 <= dropout < 1.0, f"dropout must be in [0, 1), got {dropout}."),
        )
        head_dim = dim // num_heads if head_dim is None else head_dim
        self.dim, self.head_dim = dim, head_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.softcap, self.dropout = softcap, dropout
        self.sliding_window, self.is_causal = sliding_window, is_causal
        self.scaling = head_dim**-0.5 if scaling is None else scaling
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=False)
        self.q_norm: nn.Module = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None

    def _split_heads(self, states: Tensor) -> Tensor:
        return rearrange(states, "b n (h d) -> b h n d", d=self.head_dim)

    def _merge_heads(self, heads: Tensor) -> Tensor:
        output: Tensor = self.o_proj(rearrange(heads, "b h n d -> b n (h d)"))
        return output

    def _project(self, states: Tensor, rotary: Tables | None, past: Tables | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and keys and values with the past ones, each ``(batch, heads, positions, head_dim)``."""
        query = self.q_norm(self._split_heads(self.q_proj(states)))
        key = self.k_norm(self._split_heads(self.k_proj(states)))
        value = self._split_heads(self.v_proj(states))
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if past is not None:
            check_pair_of_tensors("past", past, "the keys and values of the last output")
            keys: int | None = None
            for part, cached in zip(("past key", "past value"), past, strict=True):
                check_tensor(
                    part,
                    cached,
                    like=states,
                    batch=len(states),
                    key_heads=self.num_kv_heads,
                    keys=keys,
                    head_dim=self.head_dim,
                )
                keys = cached.shape[2]
            key = torch.cat([past[0].to(key.dtype), key], dim=2)
            value = torch.cat([past[1].to(value.dtype), value], dim=2)
        return query, key, value

    def _check_rotary(self, name: str, tables: Tables | None, states: Tensor) -> None:
        if tables is None:
            return
        check_pair_of_tensors(name, tables, "cosines and sines")
        widths: int | tuple[int, ...] = tuple(range(2, self.head_dim + 1, 2))
        for table in tables:
            check_tensor(name, table, like=states, batch=(1, states.shape[0]), positions=states.shape[1], dim=widths)
            widths = table.shape[-1]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of all positions over the sequence, ``(batch, heads, length, head_dim)``."""
        length, keys = query.shape[2], key.shape[2]
        plain = mask is None and self.sliding_window is None
        is_causal = plain and self.is_causal and length == keys
        if not is_causal and not (plain and length == 1):
            mask = self._visible(torch.arange(keys - length, keys, device=key.device)[None], keys, mask)
        return base_attention(
            query,
            key,
            value,
            scaling=self.scaling,
            mask=mask,
            is_causal=is_causal,
            softcap=self.softcap,
            sinks=self.sinks,
            dropout=self._dropout,
        )

    def _mask(self, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
        if mask is None:
            return None
        check_dense("attention_mask", mask, query)
        return broadcast_mask(mask, (*query.shape[:3], key.shape[2]))

    def _visible(self, positions: Tensor, keys: int, mask: Tensor | None) -> Tensor | None:
        window = self.sliding_window
        return key_mask(positions, keys, is_causal=self.is_causal, sliding_window=window, mask=mask)

    @property
    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0
