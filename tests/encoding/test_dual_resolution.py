from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from flexkit.encoding import DualResolutionEncoder
from flexkit.errors import ConfigError, FlexkitError, HighResInputError

SEEDS = st.integers(0, 2**31).map(torch.manual_seed)
PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))
PATCH = 2


class Tower(nn.Module):
    """Patches that look at their whole image, so that a tile differs from a cut of the whole."""

    def __init__(self, as_map: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, PATCH, stride=PATCH)
        self.as_map = as_map
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        maps: Tensor = self.patches(images) + images.mean((1, 2, 3), keepdim=True)
        return maps if self.as_map else maps.flatten(2).transpose(1, 2)


def images_for(grid: tuple[int, int], zoom: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, PATCH * grid[0] * zoom[0], PATCH * grid[1] * zoom[1])


@given(PAIRS, PAIRS, st.booleans(), st.booleans(), st.sampled_from([None, 1, 2, 5]), SEEDS)
def test_equals_encoding_tile_by_tile(
    grid: tuple[int, int], zoom: tuple[int, int], as_map: bool, projects: bool, tile_batch: int | None, seed: object
) -> None:
    tower, projector = Tower(as_map), nn.Linear(4, 6) if projects else None
    encoder = DualResolutionEncoder(
        tower, projector, zoom, tile_batch=tile_batch, grid=None if as_map or grid[0] == grid[1] else grid
    )
    images = images_for(grid, zoom)
    output = encoder(images)
    assert (output.grid, output.zoom) == (grid, zoom)
    assert tower.batches[0] == 2 and max(tower.batches[1:]) <= (tile_batch or 99)

    def encode(image: Tensor) -> Tensor:
        tokens = tower(image[None])[0]
        tokens = tokens.flatten(1).T if as_map else tokens
        return tokens if projector is None else projector(tokens)

    height, width = PATCH * grid[0], PATCH * grid[1]
    sharp = output.high_res.reshape(2, zoom[0] * grid[0], zoom[1] * grid[1], -1)
    for b in range(2):
        for r in range(zoom[0]):
            for c in range(zoom[1]):
                tile = images[b, :, r * height : (r + 1) * height, c * width : (c + 1) * width]
                own = sharp[b, r * grid[0] : (r + 1) * grid[0], c * grid[1] : (c + 1) * grid[1]]
                torch.testing.assert_close(own.flatten(0, 1), encode(tile))
        small = F.interpolate(images[b : b + 1], (height, width), mode="bilinear", antialias=True)
        torch.testing.assert_close(output.low_res[b], encode(small[0]))


def test_a_low_res_view_may_be_given() -> None:
    encoder = DualResolutionEncoder(Tower(), zoom=(1, 2))
    images, low_res = images_for((2, 2), (1, 2)), torch.randn(2, 3, 4, 4)
    output = encoder(images, low_res)
    assert torch.equal(output.low_res, encoder.tower(low_res))
    assert torch.equal(output.high_res, encoder(images).high_res)


def test_gradients_flow_through_the_low_res_view_alone() -> None:
    tower, projector = Tower(), nn.Linear(4, 4)
    images = images_for((2, 2), (2, 2)).requires_grad_()
    output = DualResolutionEncoder(tower, projector, 2)(images)
    assert not output.high_res.requires_grad
    output.low_res.sum().backward()
    for leaf in (images, tower.patches.weight, projector.weight):
        assert leaf.grad is not None and leaf.grad.any()


def test_valid_is_false_in_the_margins_of_padded_images() -> None:
    encoder = DualResolutionEncoder(Tower(), zoom=3)
    images = images_for((2, 2), (3, 3))
    assert encoder(images).valid.shape == (2, 6, 6) and encoder(images).valid.all()
    # 300 of 600 rows are padding, 150 on each side: a quarter of six cells, of which one is whole.
    valid = encoder(images, image_sizes=torch.tensor([[300, 600], [600, 100]])).valid
    assert valid[0].int().tolist() == [[0] * 6] + 4 * [[1] * 6] + [[0] * 6]
    assert valid[1].int().tolist() == 6 * [[0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    encoder = DualResolutionEncoder(Tower(), zoom=2).to(dtype)
    output = encoder(images_for((2, 2), (2, 2)).to(dtype))
    assert output.low_res.dtype == output.high_res.dtype == dtype
    assert output.low_res.isfinite().all()


def test_settings_are_shown() -> None:
    assert "zoom=(2, 2), tile_batch=4, grid=None" in repr(DualResolutionEncoder(Tower(), zoom=2, tile_batch=4))


class Returns(nn.Module):
    """A tower that returns what it is given, and a smaller thing for a second batch."""

    def __init__(self, *outputs: Any) -> None:
        super().__init__()
        self.outputs = list(outputs)

    def forward(self, images: Tensor) -> Any:
        return self.outputs.pop(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zoom": 0}, "zoom must be"),
        ({"tile_batch": 0}, "tile_batch must be a positive int or None, got 0"),
        ({"grid": (0, 3)}, "grid must be two positive ints"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DualResolutionEncoder(Tower(), **settings)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, HighResInputError, "torch.uint8.*normalise"),
        ({"images": torch.zeros(2, 3, 8, 9)}, ConfigError, "a width by 2"),
        ({"low_res": torch.zeros(2, 3, 8, 8)}, HighResInputError, r"low_res has shape \(2, 3, 8, 8\)"),
        ({"image_sizes": torch.ones(3, 2).long()}, HighResInputError, "for 3 images, expected 2"),
        ({"image_sizes": torch.ones(2, 3).long()}, HighResInputError, r"\(2, 3\)"),
        ({"image_sizes": torch.tensor(3)}, HighResInputError, r"of shape \(\)"),
        ({"image_sizes": [[8, 8], [8, 8]]}, HighResInputError, "image sizes must be a dense tensor"),
        ({"image_sizes": 8}, HighResInputError, "image sizes must be a dense tensor"),
        ({"images": [[0.0]]}, HighResInputError, "images are a list, expected a dense tensor"),
        ({"images": torch.zeros(2, 3, 8, 8).to_sparse()}, HighResInputError, "torch.sparse_coo"),
        ({"images": torch.zeros(2, 3, 8, 0)}, HighResInputError, r"no pixels: their shape is \(2, 3, 8, 0\)"),
        ({"low_res": torch.zeros(2, 3, 4, 4).numpy()}, HighResInputError, "low_res are a ndarray"),
        ({"low_res": torch.zeros(2, 3, 4, 4).long()}, HighResInputError, "low_res are torch.int64"),
        ({"low_res": torch.zeros(2, 3, 4, 4, device="meta")}, HighResInputError, r"on meta, expected .* on cpu"),
    ],
)
def test_inputs_are_checked(inputs: dict[str, Any], error: type[FlexkitError], message: str) -> None:
    with pytest.raises(error, match=message):
        DualResolutionEncoder(Tower(), zoom=2)(**{"images": torch.zeros(2, 3, 8, 8), **inputs})


def test_views_of_two_dtypes_are_seen_in_that_of_the_images() -> None:
    images, low_res = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4).half()
    encoder = DualResolutionEncoder(Tower(), zoom=2)
    assert torch.equal(encoder(images, low_res).low_res, encoder(images, low_res.float()).low_res)


@pytest.mark.parametrize(
    ("tower", "grid", "message"),
    [
        (Returns(torch.zeros(2, 5, 4)), None, "returned 5 tokens .*drop class tokens"),
        (Returns(torch.zeros(2, 4, 4)), (2, 3), r"expected 6 for a grid of \(2, 3\)"),
        (Returns(torch.zeros(2, 4, 2, 2)), (1, 4), r"a map of \(2, 2\), expected grid=\(1, 4\)"),
        (Returns(torch.zeros(2, 4)), None, r"returned \(2, 4\), expected a tensor"),
        (Returns({"tokens": 1}), None, "returned dict, expected a tensor"),
        (Returns(torch.zeros(2, 4, 4), torch.zeros(8, 9, 4)), None, r"\(3, 3\) for tiles, of \(2, 2\)"),
    ],
)
def test_what_a_tower_returns_is_checked(tower: nn.Module, grid: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DualResolutionEncoder(tower, zoom=2, grid=grid)(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("zoom", [(1, 2, 2), (3, 1, 2), (2, 1, 1)])
def test_videos_are_encoded_frame_by_frame(zoom: tuple[int, int, int]) -> None:
    tower = nn.Conv2d(3, 8, kernel_size=4, stride=4).double()
    video = torch.randn(2, 6, 3, 8 * zoom[1], 12 * zoom[2], dtype=torch.float64)
    found = DualResolutionEncoder(tower, zoom=zoom)(video)
    assert found.grid == (6 // zoom[0], 2, 3) and found.zoom == zoom
    assert found.valid.shape == (2, 6, 2 * zoom[1], 3 * zoom[2])
    pictures = DualResolutionEncoder(tower, zoom=zoom[1:])
    frames = [pictures(video[:, frame]) for frame in range(6)]
    torch.testing.assert_close(found.high_res, torch.cat([frame.high_res for frame in frames], dim=1))
    low_res = torch.stack([frame.low_res for frame in frames], dim=1).unflatten(1, (-1, zoom[0])).mean(2).flatten(1, 2)
    torch.testing.assert_close(found.low_res, low_res)  # a tower that is linear takes the mean of frames as it is


def test_videos_that_do_not_fit() -> None:
    encoder = DualResolutionEncoder(nn.Conv2d(3, 8, kernel_size=4, stride=4), zoom=(2, 1, 1))
    with pytest.raises(ConfigError, match="videos of 3 frames; expected a number divisible by 2"):
        encoder(torch.zeros(1, 3, 3, 8, 8))
    with pytest.raises(HighResInputError, match=r"low_res has shape \(1, 4, 3, 8, 8\).* expected \(1, 2, 3, 8, 8\)"):
        encoder(torch.zeros(1, 4, 3, 8, 8), torch.zeros(1, 4, 3, 8, 8))
