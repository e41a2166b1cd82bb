"""Rotary embeddings: tables of positions, whole or fractional, and how they turn queries and keys."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flexkit.errors import ConfigError

__all__ = ["rotary_tables", "rotate"]


def rotary_tables(
    positions: Tensor, dim: int, *, base: float = 10000.0, sections: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables of rotary embeddings, for one position axis or several.

    Parameters
    ----------
    positions : torch.Tensor
        ``(..., length)``; with ``sections``, ``(axes, ..., length)``. Integer or fractional.
    dim : int
        Rotated width of a head, even.
    base : float
        Period of the slowest frequency, in positions over 2 pi.
    sections : sequence of int, optional
        How many of the ``dim / 2`` frequencies each axis gets, in order (multi-axis rotary, as in Qwen2-VL).

    Returns
    -------
    cos, sin : torch.Tensor
        Each ``(..., length, dim)``, in float32 or the positions' dtype if that is wider; the halves are
        equal.

    Raises
    ------
    ConfigError
        If ``dim`` is odd, or the sections do not cover ``dim / 2`` frequencies of as many axes as given.
    """
    if dim % 2:
        raise ConfigError(f"rotary embeddings rotate pairs: dim must be even, got {dim}.")
    dtype = torch.promote_types(positions.dtype, torch.float32)
    exponent = torch.arange(0, dim, 2, dtype=dtype, device=positions.device) / dim
    angles = positions.to(dtype)[..., None] * base**-exponent
    if sections is not None:
        if sum(sections) != dim // 2 or len(sections) != positions.shape[0]:
            raise ConfigError(
                f"sections {tuple(sections)} must share out dim / 2 = {dim // 2} frequencies among the "
                f"{positions.shape[0]} axes of positions {tuple(positions.shape)}."
            )
        parts = torch.split(angles, list(sections), dim=-1)
        angles = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary tables to the first ``cos.shape[-1]`` channels of each head.

    Parameters
    ----------
    states : torch.Tensor
        ``(batch, heads, length, head_dim)``.
    cos, sin : torch.Tensor
        ``(batch or 1, length, dim)`` with ``dim <= head_dim``.

    Returns
    -------
    torch.Tensor
        Rotated states, same shape and dtype as ``states``.
    """
    turned, plain = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    half = torch.cat([-second, first], dim=-1)
    turned = turned * cos[:, None].to(states.dtype) + half * sin[:, None].to(states.dtype)
    return torch.cat([turned, plain], dim=-1)
