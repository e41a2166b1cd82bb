"""Products, and fused kernels with the log-normaliser that ``scaled_dot_product_attention`` keeps to itself.

With that, a second set of keys is added to what a kernel gave without the logits of the first: the keys are never read
again, and never copied to a wider dtype.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from typing_extensions import override

__all__ = ["Listening", "merge_fused", "products", "with_normaliser"]

_FLASH, _EFFICIENT = SDPBackend.FLASH_ATTENTION.value, SDPBackend.EFFICIENT_ATTENTION.value
_REMEMBERED, _ALIGNED = 256, 16
"""Choices that are remembered, and to how many keys a mask is padded for the memory-efficient kernel."""
_backends: dict[tuple[object, ...], int] = {}
"""Those that were chosen, by all that decides: to choose is an operator of its own, in every layer."""


def products(query: Tensor, key: Tensor) -> Tensor:
    """Products of queries and keys, for any number of query heads per key head, in their dtype.

    Parameters
    ----------
    query : torch.Tensor
        ``(batch, heads, queries, head_dim)``.
    key : torch.Tensor
        ``(batch, key_heads, keys, head_dim)``.

    Returns
    -------
    torch.Tensor
        ``(batch, heads, queries, keys)``.
    """
    # The queries of all heads that share a key head in one.
    groups, queries = query.shape[1] // key.shape[1], query.shape[2]
    if groups == queries == 1 and key.stride(-1) == 1:  # of a vector and keys as they lie it takes half the time
        return (key @ query.transpose(-1, -2)).transpose(-1, -2)
    by_key_head = query.reshape(query.shape[0], key.shape[1], groups * queries, query.shape[-1])
    return (by_key_head @ key.transpose(-1, -2)).reshape(*query.shape[:3], key.shape[2])


class Listening(TorchFunctionMode):
    """While entered, attention by ``scaled_dot_product_attention`` is what it is, to the bit, and is listened in on."""

    normaliser: Tensor | None = None
    """``(batch, heads, queries)``, float32 or wider: of the last attention, if its kernel knows it."""

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            found = with_normaliser(*args, **(kwargs or {}))
            if found is not None:
                output, self.normaliser = found
                return output
        return func(*args, **(kwargs or {}))


def with_normaliser(
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
    """``scaled_dot_product_attention`` by the kernel that it chooses, and that one's log-normaliser.

    It takes what that function takes.

    Returns
    -------
    tuple of torch.Tensor or None
        ``(batch, heads, queries, value_dim)``, and ``(batch, heads, queries)``, float32 or wider; None if the kernel
        does not tell, and where a gradient is wanted.
    """
    mask, device = attn_mask, query.device.type
    if torch.is_grad_enabled() or device not in ("cpu", "cuda") or not query.dtype == key.dtype == value.dtype:
        return None
    flags = torch._C._get_flash_sdp_enabled(), torch._C._get_mem_efficient_sdp_enabled()  # of the CPU, too
    layouts = query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride()
    of_mask = None if mask is None else (mask.shape, mask.stride(), mask.dtype)
    kind = layouts, of_mask, query.dtype, query.device, dropout_p > 0, is_causal, enable_gqa, flags
    backend = _backends.get(kind)
    if backend is None:
        backend = torch._fused_sdp_choice(query, key, value, mask, dropout_p, is_causal, enable_gqa=enable_gqa)
        if len(_backends) > _REMEMBERED:
            _backends.clear()
        _backends[kind] = backend
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.full_like(mask, -torch.inf, dtype=query.dtype).masked_fill_(mask, 0.0)
    if device == "cpu" and backend == _FLASH:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        output, normaliser = kernel(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)
    elif device == "cuda" and backend == _FLASH and mask is None and query.shape[-1] % 8 == 0:
        flash = torch.ops.aten._scaled_dot_product_flash_attention.default
        output, normaliser, *_ = flash(query, key, value, dropout_p, is_causal, scale=scale)
    elif device == "cuda" and backend == _EFFICIENT:
        if mask is not None:
            keys = mask.shape[-1]
            mask = F.pad(mask, (0, -keys % _ALIGNED))[..., :keys].expand(*query.shape[:3], keys)
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
        output, normaliser, *_ = efficient(query, key, value, mask, True, dropout_p, is_causal, scale=scale)
        normaliser = normaliser[..., : query.shape[2]]  # of which it gives a padded number
    else:
        return None
    return output, normaliser


def merge_fused(
    base: Tensor,
    base_normaliser: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    scaling: float,
    bias: float = 0.0,
    share: float = 1.0,
) -> Tensor | None:
    """Extend softmax attention to more keys, by a fused kernel; None where there is none that knows its log-normaliser.

    Parameters
    ----------
    base : torch.Tensor
        ``(batch, heads, queries, head_dim)``: attention over other keys.
    base_normaliser : torch.Tensor
        ``(batch, heads, queries, 1)``: its log-normaliser.
    query : torch.Tensor
        ``(batch, heads, queries, head_dim)``, floating.
    key, value : torch.Tensor
        ``(batch, key_heads, keys, head_dim)``; ``heads`` is a multiple of ``key_heads``.
    visible : torch.Tensor
        ``(batch, queries, keys)``, bool.
    scaling, bias : float
        Factor on the products, and what is added to them.
    share : float
        Factor on what the joint softmax gives these keys.

    Returns
    -------
    torch.Tensor
        ``(batch, heads, queries, head_dim)`` in the dtype of ``base``, whose numbers stay where nothing is visible.
    """
    groups, queries = query.shape[1] // key.shape[1], query.shape[2]
    # The queries of all heads that share a key head in one: with a mask, not every kernel knows groups.
    by_key_head = query.reshape(query.shape[0], key.shape[1], groups * queries, query.shape[-1])
    lowest = torch.finfo(query.dtype).min  # and not infinity, for which kernels differ where all is hidden
    mask = torch.full_like(visible, lowest, dtype=query.dtype).masked_fill_(visible, 0.0)[:, None]
    if queries > 1:
        mask = mask[:, :, None].expand(-1, -1, groups, -1, -1).reshape(mask.shape[0], 1, groups * queries, -1)
    found = with_normaliser(by_key_head, key, value, mask, scale=scaling)
    if found is None:
        return None
    output, normaliser = found[0].reshape(base.shape), found[1].reshape(base_normaliser.shape)
    weight = torch.sigmoid((normaliser + bias if bias else normaliser) - base_normaliser)
    weight = weight if share == 1.0 else weight * share
    return torch.lerp(base, output, weight if weight.dtype == base.dtype else weight.to(base.dtype))
