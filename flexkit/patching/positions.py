"""Position embeddings of the high-res tokens, from the positions of the low-res ones."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flexkit.attention.rotary import fractional_positions, interpolate_table
from flexkit.patching.decoder import DecoderLayer, rotary_embedding
from flexkit.patching.memory import HighResMemory, ImageSpan

__all__ = ["high_res_tables"]


@torch.no_grad()
def high_res_tables(
    decoder: nn.Module, layer: DecoderLayer, memory: HighResMemory, kind: Literal["interpolated", "fractional"]
) -> Any:
    """Position embeddings of every high-res token of a memory, as the layer takes them; None if it takes none.

    Each table is ``(batch, tokens, width)``.
    """
    if not layer.is_rotated:
        return None
    placed = [_tables(decoder, layer, memory, span, kind) for span in memory.images]
    if placed[0] is None:
        return None

    def laid_out(*tables: Tensor) -> Tensor:
        first = tables[0]
        whole = first.new_zeros(*first.shape[:-3], *memory.features.shape[:2], first.shape[-1])
        for span, table in zip(memory.images, tables, strict=True):
            whole[..., span.row, span.start : span.start + span.tokens, :] = table[..., 0, :, :]
        return whole

    return _map(laid_out, *placed)


def _tables(decoder: nn.Module, layer: DecoderLayer, memory: HighResMemory, span: ImageSpan, kind: str) -> Any:
    """Tables ``(1, tokens, width)`` of one image."""
    positions = span.positions
    if positions is None:
        raise RuntimeError("the rotary positions of an image are unknown: the text model ran without its hook.")
    if kind == "fractional":
        positions = fractional_positions(positions, span.grid, span.zoom)
    tables = rotary_embedding(decoder, layer, memory.features, positions[:, None])
    if kind == "fractional" or tables is None:
        return tables

    def finer(table: Tensor) -> Tensor:
        if table.is_complex():
            return torch.complex(finer(table.real), finer(table.imag))
        return interpolate_table(table, span.grid, span.zoom)

    return _map(finer, tables)


def _map(function: Callable[..., Tensor], *tables: Any) -> Any:
    """Apply a function to the tensors that stand in the same place of each of ``tables``."""
    if isinstance(tables[0], Tensor):
        return function(*tables)
    return tuple(_map(function, *parts) for parts in zip(*tables, strict=True))
