"""DeepSeek-VL hybrid: two towers see every image in sizes of their own."""

import pytest
import torch
from torch import Tensor

import flexkit
from flexkit import FlexConfig
from flexkit.errors import HighResInputError
from flexkit.patching.registry import find_geometry
from tests.families.test_tiles import keep_places_apart
from tests.zoo import ZOO, Row, prompt

FAMILY = ZOO["deepseek_vl_hybrid"]
ZOOM = (2, 3)


def views() -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {name: value.double() for name, value in FAMILY.views(FAMILY.config(), [FAMILY.grid], ZOOM).items()}


@pytest.mark.parametrize("name", ["pixel_values", "high_res_pixel_values"])
def test_features_lie_as_either_picture_does(name: str) -> None:
    model = FAMILY.model()
    keep_places_apart(model)
    geometry, inputs = find_geometry(model), views()
    (before,) = geometry.encode(model, inputs, [FAMILY.grid], ZOOM)
    rows, columns = FAMILY.grid[0] * ZOOM[0], FAMILY.grid[1] * ZOOM[1]
    height, width = inputs[name].shape[-2] // rows, inputs[name].shape[-1] // columns
    assert len(before) == rows * columns
    for cell in range(rows * columns):
        top, left = cell // columns * height, cell % columns * width
        changed = inputs[name].clone()
        changed[..., top : top + height, left : left + width] *= -1
        (after,) = geometry.encode(model, inputs | {name: changed}, [FAMILY.grid], ZOOM)
        assert int((after - before).norm(dim=-1).argmax()) == cell


@pytest.mark.parametrize("name", ["hd_pixel_values", "hd_high_res_pixel_values"])
def test_both_views_have_the_zoom(name: str) -> None:
    inputs = prompt(FAMILY, [Row()])
    model = flexkit.patch_model(FAMILY.model(), FlexConfig(zoom=2), trained=True)
    with pytest.raises(HighResInputError, match=name):
        model(**inputs | {name: inputs[name][..., :-1]})
    with pytest.raises(HighResInputError, match=name):
        model(**{key: value for key, value in inputs.items() if key != name})
