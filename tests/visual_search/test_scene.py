"""Scenes and questions: the same for a seed, and as they are said to be."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from flexkit.visual_search import TRACKS, Scene, draw_scene, questions
from flexkit.visual_search.items import COLOURS, GRID
from flexkit.visual_search.painting import _DARKEST, _LIGHTEST
from flexkit.visual_search.questions import WORDS
from flexkit.visual_search.scene import draw_close_up

seeds = st.integers(0, 2**32 - 1)
scenes = seeds.map(draw_scene)


@given(seeds)
def test_a_seed_draws_one_scene(seed: int) -> None:
    scene, again = draw_scene(seed), draw_scene(seed)
    assert scene.items == again.items and scene.image.tobytes() == again.image.tobytes()
    assert draw_scene(seed + 1).items != scene.items


@given(scenes)
def test_items_keep_to_cells_of_their_own(scene: Scene) -> None:
    assert 6 <= len(scene.items) <= 12
    assert len({(item.row, item.column) for item in scene.items}) == len(scene.items)
    for item in scene.items:
        left, top, right, bottom = (GRID * edge for edge in item.box)
        assert item.column <= left < right <= item.column + 1
        assert item.row <= top < bottom <= item.row + 1


@given(seeds)
def test_a_close_up_is_a_tile_of_a_scene(seed: int) -> None:
    tile, again = draw_close_up(seed, 3), draw_close_up(seed, 3)
    assert tile.items == again.items and tile.image.tobytes() == again.image.tobytes()
    assert tile.image.size == (64, 64) and 1 <= len(tile.items) <= 4
    assert questions(tile, "close-up")
    assert all(0 <= edge <= 1 for item in tile.items for edge in item.box)


@given(st.one_of(scenes, seeds.map(lambda seed: draw_close_up(seed, 3))))
def test_items_are_where_their_boxes_are(scene: Scene) -> None:
    pixels = np.asarray(scene.image, dtype=float)
    palette = {name: np.clip(colour, _DARKEST, _LIGHTEST) for name, colour in COLOURS.items()}
    for item in scene.items:
        left, top, right, bottom = (edge * len(pixels) for edge in item.box)
        x, y, reach = (left + right) / 2, (top + bottom) / 2, (right - left) / 5
        middle = pixels[round(y - reach) : round(y + reach), round(x - reach) : round(x + reach)].mean((0, 1))
        nearest = sorted(palette, key=lambda name: float(np.linalg.norm(palette[name] - middle)))
        assert item.colour in nearest[:2]


@given(scenes, st.sampled_from(list(TRACKS)))
def test_questions_name_one_object(scene: Scene, track: str) -> None:
    asked = questions(scene, track)
    assert asked
    for question in asked:
        words = question.text.lower().rstrip("?").split()
        assert set(words) <= set(WORDS) and question.answer in WORDS
        assert words[-1] == question.item.colour
        meant = [item for item in scene.items if item.colour in words and ("object" in words or item.shape in words)]
        assert meant == [question.item]


@given(scenes)
def test_a_conjunction_needs_both_words(scene: Scene) -> None:
    for question in questions(scene, "conjunction"):
        others = [item for item in scene.items if item is not question.item]
        assert any(item.colour == question.item.colour for item in others)
        assert any(item.shape == question.item.shape for item in others)


@pytest.mark.parametrize("size", [168, 1344])
def test_a_scene_is_the_same_at_any_size(size: int) -> None:
    small, large = draw_scene(3), draw_scene(3, size)
    assert large.image.size == (size, size) and large.items == small.items
    coarse = [np.asarray(scene.image.resize((24, 24), Image.Resampling.BOX), float) for scene in (small, large)]
    assert abs(coarse[0] - coarse[1]).mean() < 3


@pytest.mark.no_cover  # it trains a network of its own
def test_digits_are_lost_in_the_low_res_view_alone() -> None:
    """A small network that is shown where the digits are reads them in one view and not in the other."""
    scenes = [draw_scene([17, index]) for index in range(700)]
    assert _read(scenes, side=64) <= 0.15
    assert _read(scenes, side=192) >= 0.9


def _read(scenes: list[Scene], side: int) -> float:
    """Share of unseen digits that a network reads, which is trained on views of some size."""
    torch.manual_seed(0)
    pixels, digits = _digits(scenes, side)
    unseen = len(pixels) // 5
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(96),
        nn.ReLU(),
        nn.Linear(96, 10),
    )
    network(pixels[:1])
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.1)
    for _ in range(8):
        for batch in (unseen + torch.randperm(len(pixels) - unseen)).split(64):
            loss = nn.functional.cross_entropy(network(pixels[batch]), digits[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return float((network(pixels[:unseen]).argmax(-1) == digits[:unseen]).float().mean())


def _digits(scenes: list[Scene], side: int) -> tuple[Any, Any]:
    """The middles of shapes in views of some size, and the digits on them."""
    reach = side // 16
    pixels, digits = [], []
    for scene in scenes:
        view = np.asarray(scene.image.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
        view = np.pad(view, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
        for item in scene.items:
            left, top, right, bottom = item.box
            x, y = (round((low + high) / 2 * side) for low, high in ((left, right), (top, bottom)))
            pixels.append(view[y : y + 2 * reach, x : x + 2 * reach])
            digits.append(item.digit)
    shown = torch.from_numpy(np.stack(pixels)).movedim(-1, 1)
    return (shown - shown.mean((2, 3), keepdim=True)) / 50, torch.tensor(digits)


def test_tracks() -> None:
    assert list(TRACKS) == ["attribute", "conjunction", "low-res"]
