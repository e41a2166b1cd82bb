"""A task that only the high-res view solves: which way do the stripes of one cell run?

A picture is grey but for one cell of the low-res grid, whose pixels differ from row to row or from column to column.
Over any two by two of them these differences cancel: the low-res view, an area downsample, is grey all over.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

import flexkit
from tests.zoo import MAIN, ZOO, Row, copied, prompt

ANSWERS = (10, 11)
"""Ids of the words that say it."""
ZOOM = 2
Example = dict[str, Tensor]

families = pytest.mark.parametrize(
    "name", [name for name in (*MAIN, "qwen3_vl", "internvl", "llava_next") if name in ZOO]
)
main_families = pytest.mark.parametrize("name", MAIN)
_STRIPES = torch.tensor([[[1.0, -1.0], [1.0, -1.0]], [[1.0, 1.0], [-1.0, -1.0]]])


def striped(size: tuple[int, int], grid: tuple[int, int], cell: int, answer: int) -> Tensor:
    """The high-res picture, ``(3, *size)``."""
    height, width = size[0] // grid[0], size[1] // grid[1]
    row, column = divmod(cell, grid[1])
    picture = torch.zeros(3, *size)
    stripes = 2 * _STRIPES[answer].repeat(height // 2, width // 2)
    picture[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = stripes
    return picture


@cache
def _template(name: str, words: int) -> tuple[Example, Any]:
    """A prompt with both views of one image, and the config of its vision tower."""
    family = ZOO[name]
    inputs = prompt(family, (Row((None,), words),), zoom=(ZOOM, ZOOM))
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    return inputs, family.config().vision_config


@cache
def example(name: str, cell: int, answer: int, words: int = 3) -> Example:
    """One prompt with both views of one picture, and a label for its last word."""
    template, vision = _template(name, words)
    picture = striped(_size(template, vision), ZOO[name].grid, cell, answer)
    ids = template["input_ids"].clone()
    ids[0, -1] = ANSWERS[answer]
    return template | {
        "hd_pixel_values": _as_view(picture, template["hd_pixel_values"], vision),
        "pixel_values": _as_view(F.avg_pool2d(picture, ZOOM), template["pixel_values"], vision),
        "input_ids": ids,
        "labels": torch.full_like(ids, -100).index_copy(1, torch.tensor([ids.shape[1] - 1]), ids[:, -1:]),
    }


def examples(name: str, count: int, seed: int = 0) -> list[Example]:
    """Pictures with another cell each, both answers equally often."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = ZOO[name].grid
    cells = torch.randint(rows * columns, (count,), generator=generator).tolist()
    return [example(name, cell, index % 2) for index, cell in enumerate(cells)]


def with_noise(rows: Sequence[Example]) -> list[Example]:
    """The same examples, their high-res views replaced by noise."""
    generator = torch.Generator().manual_seed(len(rows))
    noise = [torch.randn(row["hd_pixel_values"].shape, generator=generator) for row in rows]
    return [row | {"hd_pixel_values": view} for row, view in zip(rows, noise, strict=True)]


def joined(rows: Sequence[Example]) -> Example:
    """The data collator: a batch of examples that are equally long."""
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def doubled(inputs: Example) -> Example:
    """The same in float64."""
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


@cache
def _built(name: str) -> Any:
    return ZOO[name].model().float()


def base_model(name: str) -> Any:
    """A float32 model of its own, in eval mode."""
    return copied(_built(name))


def model_for(name: str, *, trains_all: bool = False, **settings: Any) -> Any:
    """A patched float32 model, by default with only the added projections trainable."""
    settings = {"start_layer": 1, "zoom": ZOOM, "policy": flexkit.Everything()} | settings
    model = base_model(name).train()
    flexkit.patch_model(model, flexkit.FlexConfig(**settings), trained=True)
    model.requires_grad_(trains_all)
    for parameter in flexkit.flex_parameters(model):
        parameter.requires_grad_(True)
    return model


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _size(inputs: Example, vision: Any) -> tuple[int, int]:
    view = inputs["hd_pixel_values"]
    if view.ndim > 2:
        return view.shape[-2], view.shape[-1]
    _, rows, columns = inputs["hd_image_grid_thw"][0].tolist()
    return rows * vision.patch_size, columns * vision.patch_size


def _as_view(picture: Tensor, like: Tensor, vision: Any) -> Tensor:
    """The picture in the form in which the family takes it."""
    if like.ndim > 2:
        return picture.expand_as(like).clone()
    frames = repeat(picture, "c h w -> t c h w", t=vision.temporal_patch_size)
    merge, side = vision.spatial_merge_size, vision.patch_size
    return rearrange(
        frames,
        "t c (gh mh h) (gw mw w) -> (gh gw mh mw) (c t h w)",
        mh=merge,
        mw=merge,
        h=side,
        w=side,
    )
