"""MiniCPM-V: patches of all images in one strip, and the rows and columns of each."""

from typing import Any

import pytest
import torch
from torch import Tensor

import flexkit
from flexkit import FlexConfig
from flexkit.errors import HighResInputError
from flexkit.patching.registry import find_geometry
from tests.families.test_tiles import keep_places_apart
from tests.versions import tells_images_apart
from tests.zoo import ZOO, Family, Row, prompt

ZOOM = (2, 1)
KINDS = [name for name in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7") if name in ZOO]
strips = pytest.mark.parametrize("family", [ZOO[name] for name in KINDS], ids=KINDS)


def views(family: Family, grids: list[tuple[int, int]], zoom: tuple[int, int] = ZOOM) -> dict[str, Tensor]:
    torch.manual_seed(7)
    made = family.views(family.config(), grids, zoom)
    return {name: value.double() if value.is_floating_point() else value for name, value in made.items()}


def refused(family: Family, match: str, **changes: Any) -> None:
    inputs = prompt(family, [Row()])
    model = flexkit.patch_model(family.model(), FlexConfig(zoom=2), trained=True)
    with pytest.raises(HighResInputError, match=match):
        model(**inputs | changes)


@tells_images_apart
@strips
def test_features_lie_as_the_picture_does(family: Family) -> None:
    """The patches of a cell change the features of that cell most, whatever images stand before it."""
    model, geometry = family.model(), find_geometry(family.model())
    keep_places_apart(model)
    grids = [(2, 3), (3, 2)]
    inputs = views(family, grids)
    assert geometry.grids(model, inputs, ZOOM) == grids
    before = geometry.encode(model, inputs, grids, ZOOM)
    side, first = inputs["pixel_values"].shape[2], 0
    for image, (rows, columns) in enumerate(inputs["target_sizes"].tolist()):
        places = torch.arange(first, first + rows * columns).view(rows, columns)
        first += rows * columns
        merge = rows // (grids[image][0] * ZOOM[0])
        cells = places.unfold(0, merge, merge).unfold(1, merge, merge).flatten(2).flatten(0, 1)
        assert len(before[image]) == len(cells)
        for cell, patches in enumerate(cells):
            pixels = inputs["pixel_values"].unflatten(-1, (-1, side)).clone()
            pixels[..., patches, :] *= -1
            after = geometry.encode(model, inputs | {"pixel_values": pixels.flatten(-2)}, grids, ZOOM)
            change = (after[image] - before[image]).norm(dim=-1)
            assert int(change.argmax()) == cell


@strips
def test_a_view_that_is_no_zoom(family: Family) -> None:
    patches = int(prompt(family, [Row()])["hd_target_sizes"].prod())
    refused(family, "hd_target_sizes has an image of", hd_target_sizes=torch.tensor([[patches, 1]]))


@strips
def test_patches_that_do_not_add_up(family: Family) -> None:
    pixels = prompt(family, [Row()])["hd_pixel_values"]
    refused(family, "side by side", hd_pixel_values=pixels[..., :-4])


@strips
def test_another_downsampling_than_the_config_says(family: Family) -> None:
    other = "4x" if family.config().downsample_mode == "16x" else "16x"
    refused(family, "set model.config.downsample_mode", downsample_mode=other)


@strips
def test_slices(family: Family) -> None:
    """The model's own slices are image tokens too: the high-res view takes their place."""
    inputs = prompt(family, [Row((None, None))])
    one = prompt(family, [Row()])
    model = flexkit.patch_model(family.model(), FlexConfig(zoom=2), trained=True)
    high_res = {name: value for name, value in one.items() if name.startswith("hd_")}
    with pytest.raises(HighResInputError, match=r"overviews only: .*slice_mode=False"):
        model(**inputs | high_res)
