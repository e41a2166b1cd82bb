"""What tokens are taught, against pixels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkit.visual_search.items import COLOURS, SHAPES, Item, draw_crowd
from flexkit.visual_search.labels import CLASSES, UNKNOWN, token_labels

SIDE, FINE = 8, 24
seeds = st.integers(0, 2**32 - 1)
views = st.sampled_from([((0, 0), 1), *(((row, column), 3) for row in range(3) for column in range(3))])


def painted(items: tuple[Item, ...], tile: tuple[int, int], zoom: int) -> np.ndarray:
    """Which item fills each of FINE x FINE samples of each token, ``(side, side, FINE²)``; -1 for the ground."""
    places = (np.arange(SIDE * FINE) + 0.5) / SIDE / FINE
    rows, columns = ((places + at) / zoom for at in tile)
    samples = np.full((SIDE * FINE, SIDE * FINE), -1)
    for index, item in enumerate(items):
        left, top, right, bottom = item.box
        samples[np.ix_((top < rows) & (rows < bottom), (left < columns) & (columns < right))] = index
    return samples.reshape(SIDE, FINE, SIDE, FINE).transpose(0, 2, 1, 3).reshape(SIDE, SIDE, -1)


@given(seeds, views)
def test_tokens_tell_what_fills_them(seed: int, view: tuple[tuple[int, int], int]) -> None:
    items = draw_crowd(np.random.default_rng(seed))
    labels = dict(zip(CLASSES, token_labels(items, *view, SIDE).reshape(-1, SIDE, SIDE), strict=True))
    samples = painted(items, *view)
    for row, column in np.ndindex(SIDE, SIDE):
        shares = {index: float((samples[row, column] == index).mean()) for index in np.unique(samples[row, column])}
        token = {name: int(label[row, column]) for name, label in labels.items()}
        if set(shares) == {-1}:
            assert token == {name: len(COLOURS) if name == "colour" else UNKNOWN for name in CLASSES}
            continue
        seen = {index: share for index, share in shares.items() if index >= 0}
        told = [items[index] for index in seen if list(COLOURS).index(items[index].colour) == token["colour"]]
        if max(seen.values()) > 0.3:
            assert told
        if told:
            assert token["shape"] in {SHAPES.index(item.shape) for item in told}
            assert token["digit"] in {UNKNOWN, *(item.digit for item in told)}
            assert token["row"] in {UNKNOWN, *(item.row for item in told)}


@pytest.mark.parametrize(("zoom", "unknown"), [(1, ["digit"]), (3, ["row", "column"])])
def test_what_a_view_cannot_know_is_not_asked_of_it(zoom: int, unknown: list[str]) -> None:
    labels = token_labels(draw_crowd(np.random.default_rng(0)), (0, 0), zoom, SIDE)
    of_items = {name: set(label) - {UNKNOWN} for name, label in zip(CLASSES, labels, strict=True)}
    assert [name for name in CLASSES if not of_items[name]] == unknown


@given(seeds)
def test_every_digit_is_told_somewhere_and_only_near_it(seed: int) -> None:
    items = draw_crowd(np.random.default_rng(seed))
    digit = list(CLASSES).index("digit")
    tiles = {(y, x): token_labels(items, (y, x), 3, SIDE)[digit].reshape(SIDE, SIDE) for y, x in np.ndindex(3, 3)}
    whole = np.block([[tiles[y, x] for x in range(3)] for y in range(3)])
    for item in items:
        x, y = (int(place * 3 * SIDE) for place in item.digit_at)
        assert whole[y, x] == item.digit
    centres = (np.arange(3 * SIDE) + 0.5) / SIDE / 3
    for row, column in np.argwhere(whole != UNKNOWN):
        near = [
            item
            for item in items
            if max(abs(centres[column] - item.digit_at[0]), abs(centres[row] - item.digit_at[1])) < 1 / SIDE / 3
        ]
        assert whole[row, column] in {item.digit for item in near}
