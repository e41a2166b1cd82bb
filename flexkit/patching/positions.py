"""Rotary tables of the high-res tokens, from the positions of the low-res ones."""

from typing import Literal

import torch
from torch import Tensor, nn

from flexkit.attention.rotary import fractional_positions, interpolate_table
from flexkit.patching.decoder import DecoderLayer, rotary_embedding
from flexkit.patching.memory import HighResMemory

__all__ = ["high_res_tables"]


@torch.no_grad()
def high_res_tables(
    decoder: nn.Module, layer: DecoderLayer, memory: HighResMemory, kind: Literal["interpolated", "fractional"]
) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables ``(batch, tokens, rotated width)`` for every high-res token of a memory."""
    placed: list[tuple[Tensor, Tensor]] = []
    for span in memory.images:
        positions = span.positions
        if positions is None:
            raise RuntimeError("the rotary positions of an image are unknown: the text model ran without its hook.")
        if kind == "fractional":
            positions = fractional_positions(positions, span.grid, span.zoom)
        tables = rotary_embedding(decoder, layer, memory.features, positions[:, None])
        if kind == "interpolated":
            tables = tuple(interpolate_table(table, span.grid, span.zoom) for table in tables)  # type: ignore[assignment]
        placed.append(tables)
    width = placed[0][0].shape[-1]
    cos, sin = memory.features.new_zeros(2, *memory.features.shape[:2], width).unbind()
    for span, (span_cos, span_sin) in zip(memory.images, placed, strict=True):
        tokens = slice(span.start, span.start + span.tokens)
        cos[span.row, tokens], sin[span.row, tokens] = span_cos[0], span_sin[0]
    return cos, sin
