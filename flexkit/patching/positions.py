"""Position embeddings of the high-res tokens, from the positions of the low-res ones."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flexkit.attention.rotary import fractional_positions, interpolate_table
from flexkit.patching.decoder import DecoderLayer, rotary_embedding, rotary_module
from flexkit.patching.memory import HighResMemory, ImageSpan
from flexkit.patching.projected import Tokens

__all__ = ["high_res_tables"]


def high_res_tables(
    decoder: nn.Module,
    layer: DecoderLayer,
    memory: HighResMemory,
    tokens: Tokens | None,
    kind: Literal["interpolated", "fractional"],
    like: Tensor,
) -> Any:
    """Position embeddings of high-res tokens as a layer takes them; None if it takes none.

    Each table is ``(batch, tokens, width)``.

    Parameters
    ----------
    decoder : torch.nn.Module
        The text model, which owns the rotary module.
    layer : DecoderLayer
        The layer; those that rotate alike share what the memory keeps.
    memory : HighResMemory
        The high-res tokens.
    tokens : Tokens, optional
        Those of them that are wanted; None for all.
    kind : {"interpolated", "fractional"}
        How they lie between those of the low-res tokens.
    like : torch.Tensor
        With the dtype and device wanted.
    """
    rotary = rotary_module(decoder, layer)
    if rotary is None:
        return None
    alike = id(rotary), layer.kind
    whole = memory.tables.get(alike)
    if whole is None:
        whole = _all_tables(decoder, layer, memory, kind, like)
        if memory.is_placed:
            memory.tables[alike] = whole
    return whole if tokens is None else _map(tokens.of, whole)


@torch.no_grad()
def _all_tables(decoder: nn.Module, layer: DecoderLayer, memory: HighResMemory, kind: str, like: Tensor) -> Any:
    """Tables of every high-res token of a memory."""
    placed = [_tables(decoder, layer, span, kind, like) for span in memory.images]

    def laid_out(*tables: Tensor) -> Tensor:
        first = tables[0]
        whole = first.new_zeros(*first.shape[:-3], memory.batch, memory.tokens, first.shape[-1])
        for span, table in zip(memory.images, tables, strict=True):
            whole[..., span.row, span.start : span.start + span.tokens, :] = table[..., 0, :, :]
        return whole

    return _map(laid_out, *placed)


def _tables(decoder: nn.Module, layer: DecoderLayer, span: ImageSpan, kind: str, like: Tensor) -> Any:
    """Tables ``(1, tokens, width)`` of one image."""
    positions = span.positions
    if positions is None:
        raise RuntimeError("the rotary positions of an image are unknown: the text model ran without its hook.")
    if kind == "fractional":
        positions = fractional_positions(positions, span.grid, span.zoom)
    tables = rotary_embedding(decoder, layer, like, positions[:, None])
    if kind == "fractional":
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
