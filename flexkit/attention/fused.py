"""Fused kernels, and the log-normaliser that they know and ``scaled_dot_product_attention`` does not tell.

With it, a second set of keys is added to what a kernel gave without the logits of the first: the keys are never read
again, and never copied to a wider dtype.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from typing_extensions import override

__all__ = ["Listening", "fused_attention", "merge_fused"]

_FLASH, _EFFICIENT = SDPBackend.FLASH_ATTENTION.value, SDPBackend.EFFICIENT_ATTENTION.value
_REMEMBERED, _ALIGNED = 256, 16
"""Choices that are remembered, and to how many keys a mask is padded for the memory-efficient kernel."""


class Listening(TorchFunctionMode):
    """While entered, attention by ``scaled_dot_product_attention`` is what it is, to the bit, and is listened in on."""

    normaliser: Tensor | None = None
    """``(batch, heads, queries)``, float32 or wider: of the last attention, if its kernel knows it."""

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            found = _with_normaliser(*args, **(kwargs or {}))
            if found is not None:
                output, self.normaliser = found
                return output
        return func(*args, **(kwargs or {}))


def _with_normaliser(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Output and log-normaliser by the kernel that would be chosen; None if it knows none, or in training."""
    device = query.device.type
    if torch.is_grad_enabled() or device not in ("cpu", "cuda") or not query.dtype == key.dtype == value.dtype:
        return None
    backend = _backend(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    mask = attn_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = _additive(mask, query.dtype, -torch.inf)
    if device == "cpu" and backend == _FLASH:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, normaliser = kernel(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)
    elif device == "cuda" and backend == _FLASH and mask is None and query.shape[-1] % 8 == 0:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        output, normaliser, *_ = flash(query, key, value, dropout_p, is_causal, scale=scale)
    elif device == "cuda" and backend == _EFFICIENT:
        if mask is not None:
            keys = mask.shape[-1]
            mask = F.pad(mask, (0, -keys % _ALIGNED))[..., :keys].expand(*query.shape[:3], keys)
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        output, normaliser, *_ = efficient(query, key, value, mask, True, dropout_p, is_causal, scale=scale)
    else:
        return None
    return output, normaliser[..., : query.shape[2]]


_backends: dict[tuple[object, ...], int] = {}
"""Those that were chosen, by all that decides: a choice takes longer than it takes to look it up."""


def _backend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, is_causal: bool, grouped: bool
) -> int:
    """What ``scaled_dot_product_attention`` would choose."""
    shapes = query.shape, key.shape, value.shape, None if mask is None else mask.shape
    flags = torch._C._get_flash_sdp_enabled(), torch._C._get_mem_efficient_sdp_enabled()  # of the CPU, too
    kind = *shapes, query.dtype, query.device, mask is None or mask.dtype, dropout > 0, is_causal, grouped, flags
    backend = _backends.get(kind)
    if backend is None:
        backend = int(torch._fused_sdp_choice(query, key, value, mask, dropout, is_causal, enable_gqa=grouped))
        if len(_backends) > _REMEMBERED:
            _backends.clear()
        _backends[kind] = backend
    return backend


def _additive(visible: Tensor, dtype: torch.dtype, hidden: float) -> Tensor:
    """A mask to be added to logits, from one of what is seen."""
    # Constants are made once; but those of a trace, or of a tensor that only pretends, are its own.
    known = type(visible) is Tensor and not torch.compiler.is_compiling()
    return torch.where(visible, *(_constants if known else _constants.__wrapped__)(dtype, visible.device, hidden))


@lru_cache
@torch.inference_mode(False)
def _constants(dtype: torch.dtype, device: torch.device, hidden: float) -> tuple[Tensor, Tensor]:
    return torch.zeros((), dtype=dtype, device=device), torch.full((), hidden, dtype=dtype, device=device)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, *, scaling: float
) -> tuple[Tensor, Tensor] | None:
    """Softmax attention by a fused kernel, and its log-normaliser; None where there is no kernel that knows it.

    Parameters
    ----------
    query : torch.Tensor
        ``(batch, heads, queries, head_dim)``, floating.
    key, value : torch.Tensor
        ``(batch, key_heads, keys, head_dim)``; ``heads`` is a multiple of ``key_heads``.
    visible : torch.Tensor
        ``(batch, queries, keys)``, bool.
    scaling : float
        Factor on the products.

    Returns
    -------
    output : torch.Tensor
        ``(batch, heads, queries, head_dim)``, finite also where nothing is visible.
    normaliser : torch.Tensor
        ``(batch, heads, queries, 1)``, float32 or wider; where nothing is visible next to the lowest finite number of
        the dtype of ``query``.
    """
    groups, queries = query.shape[1] // key.shape[1], query.shape[2]
    # The queries of all heads that share a key head in one: with a mask, not every kernel knows groups.
    by_key_head = query.reshape(len(query), key.shape[1], groups * queries, query.shape[-1])
    mask = _additive(visible, query.dtype, torch.finfo(query.dtype).min)[:, None]
    if queries > 1:
        mask = mask[:, :, None].expand(-1, -1, groups, -1, -1).reshape(len(mask), 1, groups * queries, -1)
    found = _with_normaliser(by_key_head, key, value, mask, scale=scaling)
    if found is None:
        return None
    output, normaliser = found
    return output.reshape(*query.shape[:3], -1), normaliser.reshape(*query.shape[:3], 1)


def merge_fused(base: Tensor, base_normaliser: Tensor, other: Tensor, normaliser: Tensor, share: float = 1.0) -> Tensor:
    """The joint softmax over two sets of keys, from that over each.

    Parameters
    ----------
    base, other : torch.Tensor
        ``(batch, heads, queries, value_dim)``: attention over each set.
    base_normaliser, normaliser : torch.Tensor
        ``(batch, heads, queries, 1)``: their log-normalisers.
    share : float
        Factor on what the other set gets.

    Returns
    -------
    torch.Tensor
        ``(batch, heads, queries, value_dim)`` in the dtype of ``base``, which stays what it is where the other set is
        empty.
    """
    weight = torch.sigmoid(normaliser - base_normaliser)
    return torch.lerp(base, other, (weight if share == 1.0 else weight * share).to(base.dtype))
