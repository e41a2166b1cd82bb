"""What querying rows may see, read off the mask that the base kernel was given."""

import torch
from torch import Tensor

from flexkit.attention.base import key_mask
from flexkit.attention.core import hidden_keys
from flexkit.attention.rows import QueryRows
from flexkit.errors import UnsupportedModelError

__all__ = ["rows_of_mask", "visible_keys"]


def rows_of_mask(
    mask: Tensor | None, rows: QueryRows, *, keys: int, past: int | Tensor, is_causal: bool, sliding_window: int | None
) -> Tensor | None:
    """The mask of the querying rows alone.

    Parameters
    ----------
    mask : torch.Tensor, optional
        None (the kernel is causal by itself), a padding mask ``(batch, keys)`` (FlashAttention, causal by itself
        too), or ``(batch or 1, heads or 1, length or 1, keys)``, bool or additive.
    rows : QueryRows
        The querying rows.
    keys : int
        Number of keys.
    past : int
        Index of the key that belongs to the first position of the call.
    is_causal : bool
        Whether a kernel without a mask is causal.
    sliding_window : int, optional
        The window of a kernel without a mask.

    Returns
    -------
    torch.Tensor or None
        Broadcastable to ``(batch, heads, queries, keys)``; None if everything is seen.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise UnsupportedModelError(
            f"flexkit cannot read rows of a {type(mask).__name__}; load the model with attn_implementation='sdpa'."
        )
    if mask is not None and mask.ndim == 4:
        mask = mask[..., :keys]
        mask = mask.expand(len(rows.index), -1, rows.mask.shape[1], -1).transpose(1, 2)
        return rows.gather(mask).transpose(1, 2)
    padding = None if mask is None else mask[:, None, None, :keys].bool()
    return key_mask(rows.index + past, keys, is_causal=is_causal, sliding_window=sliding_window, mask=padding)


def visible_keys(mask: Tensor | None, rows: QueryRows, keys: int) -> Tensor:
    """The keys that the querying rows see in some head, ``(batch, queries, keys)``, bool.

    Parameters
    ----------
    mask : torch.Tensor, optional
        Of these rows, from :func:`rows_of_mask`.
    rows : QueryRows
        The querying rows.
    keys : int
        Number of keys.
    """
    shape = len(rows.mask), rows.count, keys
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=rows.mask.device)
    return (~hidden_keys(mask)).any(1).expand(shape)
