"""Position embeddings of the high-res tokens, from the positions of the low-res ones."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flexkit.grids import fractional_positions, interpolate_table
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
        The layer.
    memory : HighResMemory
        The high-res tokens.
    tokens : Tokens, optional
        Those of them that are wanted; None for all.
    kind : {"interpolated", "fractional"}
        How they lie between those of the low-res tokens.
    like : torch.Tensor
        With the dtype and device wanted.
    """
    if rotary_module(decoder, layer) is None:
        return None
    places = [_in_span(span, tokens) for span in memory.images]
    tables = [
        _tables(decoder, layer, span, local, kind, like) for span, (_, local) in zip(memory.images, places, strict=True)
    ]

    def laid_out(*tables: Tensor) -> Tensor:
        first = tables[0]
        length = memory.tokens if tokens is None else tokens.index.shape[1]
        whole = first.new_zeros(*first.shape[:-3], memory.batch, length, first.shape[-1])
        for span, (place, _), table in zip(memory.images, places, tables, strict=True):
            whole[..., span.row, place, :] = table[..., 0, :, :]
        return whole

    return _map(laid_out, *tables)


def _in_span(span: ImageSpan, tokens: Tokens | None) -> tuple[Any, Tensor | None]:
    """Where tokens of one image stand among those that are wanted, and which of the image they are; None for all."""
    if tokens is None:
        return slice(span.start, span.start + span.tokens), None
    local = tokens.index[span.row] - span.start
    place = (tokens.valid[span.row] & (local >= 0) & (local < span.tokens)).nonzero().flatten()
    return place, local[place]


@torch.no_grad()
def _tables(
    decoder: nn.Module, layer: DecoderLayer, span: ImageSpan, tokens: Tensor | None, kind: str, like: Tensor
) -> Any:
    """Tables ``(1, tokens, width)`` of some tokens of one image, or of all."""
    positions = span.positions
    if positions is None:
        raise RuntimeError("the rotary positions of an image are unknown: the text model ran without its hook.")
    if kind == "fractional":
        positions = fractional_positions(positions, span.grid, span.zoom)
        if tokens is None:
            return rotary_embedding(decoder, layer, like, positions[:, None])
        # Frequencies may follow the largest position: with the last one they are those of the whole image.
        wanted = torch.cat([positions[:, tokens], positions[:, -1:]], dim=1)
        return _map(lambda table: table[..., :-1, :], rotary_embedding(decoder, layer, like, wanted[:, None]))

    def finer(table: Tensor) -> Tensor:
        if table.is_complex():
            return torch.complex(finer(table.real), finer(table.imag))
        return interpolate_table(table, span.grid, span.zoom, tokens)

    return _map(finer, rotary_embedding(decoder, layer, like, positions[:, None]))


def _map(function: Callable[..., Tensor], *tables: Any) -> Any:
    """Apply a function to the tensors that stand in the same place of each of ``tables``."""
    if isinstance(tables[0], Tensor):
        return function(*tables)
    return tuple(_map(function, *parts) for parts in zip(*tables, strict=True))
