"""Pictures that are padded to one size, with a mask of their pixels: what is padding is not read."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import flexkit
from flexkit import FlexConfig
from flexkit.patching import get_patch
from tests.zoo import CONTEXT, Row, low_res, prompt

SIDE = 42
SIZES, CELLS = ((28, 42), (42, 14)), ((2, 3), (3, 1))
"""Of two pictures, in pixels and in cells."""
MASKS = {"aria": "pixel_mask", "idefics2": "pixel_attention_mask"}
each = pytest.mark.parametrize("name", MASKS)


def patched(name: str, **settings: Any) -> Any:
    defaults = {"zoom": 2, "policy": flexkit.Everything(), "start_layer": 0, "select_from": "same"}
    return flexkit.patch_model(CONTEXT[name].model(), FlexConfig(**defaults | settings), trained=True)


def padded(name: str, *sizes: tuple[int, int], zoom: int = 2) -> dict[str, Tensor]:
    """A row for every image, of which so many pixels are a picture."""
    inputs = prompt(CONTEXT[name], [Row()] * len(sizes), zoom=(zoom, zoom))
    mask = torch.zeros(len(sizes), SIDE, SIDE, dtype=torch.long)
    for index, (height, width) in enumerate(sizes):
        mask[index, :height, :width] = 1
    view = zoom_of(mask, zoom)[:, None]
    inputs["hd_pixel_values"] = inputs["hd_pixel_values"] * view
    pixels = inputs["pixel_values"]
    inputs["pixel_values"] = pixels * mask.view(len(sizes), *[1] * (pixels.ndim - 3), SIDE, SIDE)
    return inputs | {MASKS[name]: mask[:, None] if pixels.ndim == 5 else mask.bool()}


def zoom_of(mask: Tensor, zoom: int) -> Tensor:
    return mask.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    result: Tensor = model(**inputs).logits
    return result


@each
@pytest.mark.parametrize("policy", [flexkit.Everything(), flexkit.TopK(20), flexkit.TopK(2)], ids=repr)
def test_padding_is_not_read(name: str, policy: Any) -> None:
    """The picture is, and what the view shows behind it makes no difference."""
    model, inputs = patched(name, policy=policy), padded(name, *SIZES)
    found = logits(model, inputs)
    assert (found - logits(model, low_res(inputs))).abs().amax((1, 2)).min() > 1e-4
    behind = 1 - zoom_of(inputs[MASKS[name]].view(2, SIDE, SIDE).long(), 2)[:, None]
    other = inputs["hd_pixel_values"] + behind * torch.randn_like(inputs["hd_pixel_values"])
    torch.testing.assert_close(logits(model, inputs | {"hd_pixel_values": other}), found)
    with flexkit.trace(model) as trace:
        logits(model, inputs)
    for mask, (rows, columns) in zip(trace.mask(0, trace.layers[0]), CELLS, strict=True):
        assert not mask[..., 2 * rows :, :].any() and not mask[..., 2 * columns :].any()


@each
def test_at_zoom_1_the_features_are_those_of_the_padded_picture(name: str) -> None:
    model, inputs = patched(name, zoom=1), padded(name, *SIZES, zoom=1)
    inputs["hd_pixel_values"] = inputs["pixel_values"].view(inputs["hd_pixel_values"].shape)
    geometry: Any = get_patch(model).geometry
    high = {"hd_pixel_values": inputs["hd_pixel_values"]}
    features = geometry.route.read(model, get_patch(model), high, low_res(inputs)).features.states
    with torch.no_grad():
        shown = geometry.route.show(model, low_res(inputs), 2).view(2, 3, 3, -1)
    for own, given, (rows, columns) in zip(features, shown, CELLS, strict=True):
        assert torch.equal(own.view(3, 3, -1)[:rows, :columns], given[:rows, :columns])


def test_a_batch_of_several_shapes_equals_its_rows() -> None:
    """A picture alone is not padded; Idefics 2 pads those of a batch to the largest."""
    model, sizes = patched("idefics2"), ((28, 42), (42, 30))
    inputs = padded("idefics2", *sizes)
    together = logits(model, inputs)
    for row, (height, width) in enumerate(sizes):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        for key, times in (("pixel_values", 1), ("pixel_attention_mask", 1), ("hd_pixel_values", 2)):
            alone[key] = alone[key][..., : times * height, : times * width]
        torch.testing.assert_close(logits(model, alone)[0], together[row])


def test_the_rest_of_a_cell_at_the_edge_is_not_looked_at() -> None:
    model, inputs = patched("idefics2"), padded("idefics2", (42, 42))
    wider = {"pixel_attention_mask": torch.ones(1, 1, 42, 47, dtype=torch.long)}
    wider |= {key: pad(inputs[key], (0, 5 * times)) for key, times in (("pixel_values", 1), ("hd_pixel_values", 2))}
    torch.testing.assert_close(logits(model, inputs | wider), logits(model, inputs))
