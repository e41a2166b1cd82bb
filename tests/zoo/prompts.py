"""Prompts with images for the models of the zoo."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.zoo.family import IMAGE, PAD, VIDEO, Family, Grid, joined

__all__ = ["Row", "low_res", "prompt"]

_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")


@dataclass(frozen=True)
class Row:
    """One row of a batch: the grids of its images, with a word before all, and words after them."""

    images: tuple[Grid | None, ...] = (None,)
    words: int = 4


def prompt(
    family: Family,
    rows: Sequence[Row] = (Row(),),
    *,
    zoom: Grid = (2, 2),
    padding: str = "left",
    seed: int = 1,
    only: int | None = None,
) -> dict[str, Tensor]:
    """Inputs of both views for a batch; ``hd_*`` are missing if no row has an image.

    ``only`` gives one of the rows as a batch of its own, the same words and pictures without padding.
    """
    config = family.settled
    sequences, low, high = [], [], []
    for index, row in enumerate(rows):
        torch.manual_seed(1000 * seed + index)
        grids = [grid or family.grid for grid in row.images]
        sequences.append(_tokens(row, grids, family))
        low.append(family.views(config, grids))
        high.append(family.views(config, grids, zoom))
    if only is not None:
        rows, sequences, low, high = ([each[only]] for each in (rows, sequences, low, high))
    length = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), length), PAD)
    mask = torch.zeros_like(ids)
    for index, sequence in enumerate(sequences):
        place = slice(length - len(sequence), length) if padding == "left" else slice(0, len(sequence))
        ids[index, place], mask[index, place] = sequence, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    types = (ids == IMAGE) + 2 * (ids == VIDEO)
    if len(family.grid) == 3:  # some kinds have one placeholder for both
        types = 2 * types.bool()
    inputs |= {name: types.long() for name in _TOKEN_TYPES if name in family.accepted}
    inputs |= _joined(low, family)
    if family.finish:
        inputs = family.finish(config, inputs, [len(row.images) for row in rows])
    return inputs | {f"hd_{name}": value for name, value in _joined(high, family).items()}


def low_res(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of the base model among those of both views."""
    return {name: value for name, value in inputs.items() if not name.startswith("hd_")}


def _tokens(row: Row, grids: Sequence[Grid], family: Family) -> Tensor:
    parts = [torch.randint(3, 80, (1,)), *(torch.tensor(family.shown(grid)) for grid in grids)]
    return torch.cat([*parts, torch.randint(3, 80, (row.words,))])


def _joined(rows: Sequence[dict[str, Tensor]], family: Family) -> dict[str, Tensor]:
    views = joined([row for row in rows if row], family.strips)
    return {name: value.double() if value.is_floating_point() else value for name, value in views.items()}
