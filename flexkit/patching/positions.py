"""Position embeddings of the high-res tokens, from the positions of the low-res ones."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flexkit.attention.rotary import fractional_positions, interpolate_table
from flexkit.patching.decoder import DecoderLayer, rotary_embedding, rotary_module
from flexkit.patching.memory import HighResMemory, ImageSpan
from flexkit.patching.projected import Tokens

__all__ = ["HighResTables"]


@dataclass
class HighResTables:
    """Position embeddings of the high-res tokens in one call; layers that rotate alike share them."""

    decoder: nn.Module
    kind: Literal["interpolated", "fractional"]
    _whole: dict[Any, Any] = field(default_factory=dict)

    def of(self, layer: DecoderLayer, memory: HighResMemory, tokens: Tokens | None, like: Tensor) -> Any:
        """Tables as a layer takes them, each ``(batch, tokens, width)``; None if it takes none.

        Parameters
        ----------
        layer : DecoderLayer
            The layer.
        memory : HighResMemory
            The high-res tokens.
        tokens : Tokens, optional
            Those of them that are wanted; None for all.
        like : torch.Tensor
            With the dtype and device wanted.
        """
        rotary = rotary_module(self.decoder, layer)
        if rotary is None:
            return None
        alike = id(rotary), layer.kind
        if alike not in self._whole:
            self._whole[alike] = _high_res_tables(self.decoder, layer, memory, self.kind, like)
        whole = self._whole[alike]
        return whole if tokens is None else _map(tokens.of, whole)


@torch.no_grad()
def _high_res_tables(decoder: nn.Module, layer: DecoderLayer, memory: HighResMemory, kind: str, like: Tensor) -> Any:
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
