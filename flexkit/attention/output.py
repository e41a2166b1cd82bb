"""What hierarchical self-attention returns."""

from dataclasses import dataclass

from torch import Tensor

from flexkit.attention.rows import QueryRows

__all__ = ["HierarchicalAttentionOutput"]


@dataclass(frozen=True)
class HierarchicalAttentionOutput:
    """What :class:`HierarchicalSelfAttention` returns.

    Parameters
    ----------
    hidden_states : torch.Tensor
        ``(batch, length, dim)``.
    map : torch.Tensor or None
        ``(batch, querying rows, rows, columns)``: the selector's scores of each querying row; None unless
        asked for.
    selected : torch.Tensor or None
        ``(batch, querying rows, high-res rows, high-res columns)``, bool: made from this layer's map, for the
        next layer. None without a selector or a grid.
    queries : QueryRows
        Which positions the querying rows are; entries beyond a batch row's own number mean nothing.
    past : tuple
        Keys and values so far, each ``(batch, key_heads, keys, head_dim)``, to be handed in with the next
        positions.
    """

    hidden_states: Tensor
    map: Tensor | None
    selected: Tensor | None
    queries: QueryRows
    past: tuple[Tensor, Tensor]
