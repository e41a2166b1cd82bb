import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexkit.encoding import split_tiles, stitch_tiles
from flexkit.errors import ConfigError

SEEDS = st.integers(0, 2**31).map(torch.manual_seed)
PAIRS = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(PAIRS, PAIRS, SEEDS)
def test_tiles_are_cut_in_raster_order(zoom: tuple[int, int], size: tuple[int, int], seed: object) -> None:
    (down, across), (height, width) = zoom, size
    images = torch.randn(2, 3, down * height, across * width)
    tiles = split_tiles(images, zoom)
    assert tiles.shape == (2, down * across, 3, height, width)
    for r in range(down):
        for c in range(across):
            piece = images[:, :, r * height : (r + 1) * height, c * width : (c + 1) * width]
            assert torch.equal(tiles[:, r * across + c], piece)


@given(PAIRS, PAIRS, SEEDS)
def test_stitching_undoes_cutting(zoom: tuple[int, int], grid: tuple[int, int], seed: object) -> None:
    images = torch.randn(2, 5, zoom[0] * grid[0], zoom[1] * grid[1])
    features = split_tiles(images, zoom).flatten(3).transpose(2, 3)
    assert torch.equal(stitch_tiles(features, grid, zoom), images.permute(0, 2, 3, 1))


@pytest.mark.parametrize("shape", [(1, 3, 6, 7), (1, 3, 7, 6), (3, 6, 6)])
def test_images_that_cannot_be_cut(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"height divisible by 3 and a width by 2"):
        split_tiles(torch.zeros(shape), (3, 2))


@pytest.mark.parametrize(
    "features", [torch.zeros(1, 4, 6, 8), torch.zeros(1, 6, 5, 8), torch.zeros(6, 6, 8)], ids=lambda f: str(f.shape)
)
def test_features_that_cannot_be_stitched(features: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"expected \(batch, 6, 6, dim\): 3 x 2 tiles of 2 x 3 cells"):
        stitch_tiles(features, (2, 3), (3, 2))
