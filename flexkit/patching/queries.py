"""Which positions of a call read high-res keys."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexkit.attention.rows import QueryRows
from flexkit.errors import HighResInputError
from flexkit.patching.config import FlexConfig
from flexkit.patching.memory import HighResMemory

__all__ = ["IGNORED", "asks_last", "check_positions", "kept_positions", "query_rows"]

IGNORED = -100


def query_rows(
    config: FlexConfig,
    inputs: Mapping[str, Any],
    memory: HighResMemory,
    named: Tensor | None,
    *,
    past: int | Tensor,
    length: int,
    repeats: int,
) -> QueryRows:
    """The querying positions of a call.

    Parameters
    ----------
    config : FlexConfig
        The patch's settings.
    inputs : mapping
        The base model's inputs: labels, attention_mask and logits_to_keep decide.
    memory : HighResMemory
        Rows without an image never query.
    named : torch.Tensor, optional
        ``(batch, positions)``, bool: positions from the start of the sequence, named for this call; later ones query.
    past, length : int
        Positions before the call, and in it.
    repeats : int
        How many successive batch rows continue one sample.
    """
    attended = _attended(inputs.get("attention_mask"), memory, length)
    labels = inputs.get("labels")
    if named is None and isinstance(config.queries, Tensor):
        named = check_positions("queries", config.queries)
    if labels is not None:
        mask = torch.zeros_like(attended)
        mask[:, :-1] = labels[:, 1:] != IGNORED
    elif named is not None:
        mask = _named(named.to(attended.device), memory.batch, past, length, repeats)
    elif config.queries == "all":
        mask = attended
    else:
        mask = attended & _last(attended, inputs.get("logits_to_keep", 0))
    return QueryRows(mask & memory.rows_with_images[:, None])


def asks_last(config: FlexConfig) -> bool:
    """Whether the last position of a prompt queries, and all behind it."""
    return isinstance(config.queries, str) and config.queries == "last"


def kept_positions(logits_to_keep: int | Tensor, length: int) -> Tensor:
    """``(kept,)``, int64: the positions whose logits a model returns."""
    positions = torch.arange(length)
    if isinstance(logits_to_keep, int):
        return positions[-logits_to_keep:] if logits_to_keep else positions
    return positions[logits_to_keep.cpu()]


def check_positions(name: str, named: object) -> Tensor:
    """Return positions that are named by a bool tensor; raise :class:`~flexkit.errors.HighResInputError` for others."""
    if not isinstance(named, Tensor) or named.ndim != 2 or named.is_meta:
        given = (
            f"a tensor {tuple(named.shape)} on {named.device}" if isinstance(named, Tensor) else type(named).__name__
        )
        raise HighResInputError(f"{name} must be a bool tensor (batch, positions), got {given}.")
    if named.dtype != torch.bool:
        raise HighResInputError(f"{name} are {named.dtype} of shape {tuple(named.shape)}; expected torch.bool.")
    return named


def _attended(attention_mask: object, memory: HighResMemory, length: int) -> Tensor:
    """Positions that are not padding; masks other than a padding mask come from generate, which pads on the left."""
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask[:, -length:].bool().to(memory.device)
    return torch.ones(memory.batch, length, dtype=torch.bool, device=memory.device)


def _last(attended: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, Tensor):
        mask = torch.zeros_like(attended)
        mask[:, logits_to_keep] = True
        return mask
    after = attended.flip(-1).cumsum(-1).flip(-1)
    return after <= max(1, logits_to_keep)


def _named(named: Tensor, batch: int, past: int | Tensor, length: int, repeats: int) -> Tensor:
    named = named.repeat_interleave(repeats, dim=0) if len(named) * repeats == batch else named
    too_long = isinstance(past, int) and named.shape[1] > past + length
    if len(named) != batch or too_long:
        raise HighResInputError(
            f"queries are {named.dtype} of shape {tuple(named.shape)}; expected torch.bool of shape ({batch}, "
            f"{past + length}) or shorter: one entry a position, from the start of the sequence."
        )
    if not named.shape[1]:
        return named.new_ones(batch, length)
    place = past + torch.arange(length, device=named.device)
    return named[:, place.clamp_max(named.shape[1] - 1)] | (place >= named.shape[1])
