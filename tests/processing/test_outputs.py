from typing import Any

import numpy as np
import pytest
import torch

from flexkit.processing.outputs import joined, like
from flexkit.processing.resizing import extent, resized


def test_like_what_is_there() -> None:
    values = [torch.ones(2, 3), torch.zeros(2, 3)]
    assert torch.equal(like(values, torch.ones(1)), torch.stack(values))
    assert np.array_equal(like(values, np.ones(1)), np.stack([np.ones((2, 3)), np.zeros((2, 3))]))
    arrays = like(values, [np.ones(1)])
    assert [type(array) for array in arrays] == [np.ndarray, np.ndarray]
    assert all(map(torch.equal, like(values, [torch.ones(1)]), values))
    assert like(torch.tensor([[1, 2]]), [(3, 4)]) == [[1, 2]]


def test_joined_sizes_that_differ() -> None:
    whole = joined([torch.ones(1, 2, 3), torch.ones(2, 3, 1)], filler=-1)
    assert whole.shape == (3, 3, 3)
    assert (whole[0, :2] == 1).all()
    assert (whole[0, 2] == -1).all()
    assert (whole[1:, :, :1] == 1).all()
    assert (whole[1:, :, 1:] == -1).all()


def test_joined_side_by_side() -> None:
    assert joined([torch.ones(1, 2), torch.zeros(1, 3)], axis=-1).tolist() == [[1, 1, 0, 0, 0]]


def test_resized_on_a_canvas() -> None:
    image = np.full((3, 4, 4), 7, dtype=np.uint8)
    enlarged = resized(image, (8, 6), {"resample": 2}, (9, 8))
    assert enlarged.shape == (3, 9, 8)
    assert enlarged.dtype == np.uint8
    assert (enlarged[:, :8, :6] == 7).all()
    assert not enlarged[:, 8:].any()
    assert not enlarged[:, :, 6:].any()


class Padding:
    """Halves the picture, and puts two rows and a column of black below and beside it."""

    do_resize = True

    def resize(self, image: Any, size: int) -> torch.Tensor:
        assert size == 7
        return torch.nn.functional.pad(torch.as_tensor(image[:, ::2, ::2]), (0, 1, 0, 2))

    def preprocess(self, images: list[Any], do_resize: bool = True, **options: object) -> dict[str, Any]:
        image = self.resize(image=images[0], size=7) if do_resize else images[0]
        return {"pixel_values": image[None]}


@pytest.mark.parametrize("image", [np.zeros((3, 8, 6)), torch.zeros(3, 8, 6)], ids=["array", "tensor"])
def test_extent_is_the_picture_without_its_padding(image: Any) -> None:
    outputs, shown = extent(Padding(), image, {})
    assert outputs["pixel_values"].shape == (1, 3, 6, 4)
    assert shown == (4, 3)
    assert extent(Padding(), image, {"do_resize": False})[1] == (8, 6)


class Silent(Padding):
    """Resizes by other means."""

    def preprocess(self, images: list[Any], **options: Any) -> dict[str, Any]:
        return {"pixel_values": np.zeros((1, 3, 2, 2))}


def test_extent_is_not_known_where_nothing_was_seen() -> None:
    assert extent(Silent(), np.zeros((3, 8, 6)), {})[1] is None
