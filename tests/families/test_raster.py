"""High-res views that are lists of patches, for towers of any size."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flexkit.errors import HighResInputError
from flexkit.patching.families import FAMILIES
from flexkit.patching.geometry import DynamicGrid, find_geometry
from tests.versions import tells_images_apart
from tests.zoo import ZOO, Family
from tests.zoo.raster import RASTER

ZOOM = (2, 3)
GRIDS = [(2, 3), (3, 2)]
DYNAMIC = [family for family in ZOO.values() if isinstance(FAMILIES.get(family.name), DynamicGrid)]
dynamic = pytest.mark.parametrize("family", DYNAMIC, ids=[family.name for family in DYNAMIC])
two_images = pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=tells_images_apart if each.name == "minimax_m3_vl" else ()) for each in DYNAMIC],
    ids=[family.name for family in DYNAMIC],
)


def view(family: Family) -> dict[str, Tensor]:
    torch.manual_seed(7)
    views = family.views(family.config(), GRIDS, ZOOM)
    return {name: value.double() if value.is_floating_point() else value for name, value in views.items()}


def keep_places_apart(model: Any) -> None:
    """Weaken what carries information from place to place in the tower: its attention."""
    decoder = set(find_geometry(model).decoder(model).modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            if module not in decoder and "attn" in name and name.split(".")[-1] in ("o_proj", "out_proj", "proj"):
                module.weight.mul_(1e-3)


def patches_of(family: Family, row: int, column: int, columns: int) -> list[int]:
    """Indices of the patches of a cell: its only one; four in a row; or, where the tower merges late, two by two."""
    first = row * columns + column
    if family.name == "inkling2":
        return [first]
    if family not in RASTER:
        return [4 * first + patch for patch in range(4)]
    above = 2 * (first + row * columns)
    return [above, above + 1, above + 2 * columns, above + 2 * columns + 1]


@two_images
def test_features_lie_as_the_picture_does(family: Family) -> None:
    """Whatever a family merges and reorders: the patches of a cell change the features of that cell most."""
    model, views = family.model(), view(family)
    keep_places_apart(model)
    geometry = find_geometry(model)
    grids = geometry.grids(model, views, ZOOM)
    assert grids == GRIDS
    rows, columns = GRIDS[0][0] * ZOOM[0], GRIDS[0][1] * ZOOM[1]
    plain = geometry.encode(model, views, grids, ZOOM)
    assert [len(features) for features in plain] == [rows * columns, GRIDS[1][0] * ZOOM[0] * GRIDS[1][1] * ZOOM[1]]
    for row, column in [(0, 0), (0, columns - 1), (1, 2), (2, 1), (rows - 1, 0), (rows - 1, columns - 1)]:
        pixels = views["pixel_values"].clone()
        changed = patches_of(family, row, column, columns)
        pixels[changed] = torch.randn_like(pixels[changed])
        first, second = geometry.encode(model, views | {"pixel_values": pixels}, grids, ZOOM)
        difference = (first - plain[0]).norm(dim=-1)
        assert int(difference.argmax()) == row * columns + column
        torch.testing.assert_close(second, plain[1])


@dynamic
def test_each_image_has_as_many_tokens_as_its_layout(family: Family) -> None:
    model = family.model()
    geometry = find_geometry(model)
    for grid in GRIDS:
        layout = geometry.layout(model, grid)
        assert len(layout) == len([token for token in family.tokens(grid) if token == model.config.image_token_id])
        assert int(layout.sum()) == grid[0] * grid[1]


MERGES = {
    "too few": (torch.tensor([2]), "one number for each image"),
    "does not divide": (torch.tensor([5, 5]), "divides its rows"),
}


@pytest.mark.parametrize("kind", MERGES)
def test_merge_sizes_that_do_not_fit(kind: str) -> None:
    merges, match = MERGES[kind]
    model, views = ZOO["video_llama_3"].model(), view(ZOO["video_llama_3"])
    with pytest.raises(HighResInputError, match=match):
        find_geometry(model).grids(model, views | {"image_merge_sizes": merges}, ZOOM)
