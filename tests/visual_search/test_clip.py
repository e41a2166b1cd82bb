"""Clips: the same for a seed, and their digits seen when they are said to be, and not where a model samples."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkit.visual_search import Clip, draw_clip, draw_scene, questions
from flexkit.visual_search.clip import FRAMES, SAMPLED
from flexkit.visual_search.items import GRID

seeds = st.integers(0, 2**32 - 1)
clips = seeds.map(draw_clip)


def other_digits(clip: Clip) -> Clip:
    """The same clip, but for its digits."""
    items, later = (
        tuple(replace(item, digit=(item.digit + 1) % 10) for item in items) for items in (clip.items, clip.later)
    )
    return Clip(items, later, clip.shown, clip.looks, clip.size[0])


@given(seeds)
def test_a_seed_draws_one_clip(seed: int) -> None:
    clip, again = draw_clip(seed), draw_clip(seed)
    assert clip.items == again.items and clip.shown == again.shown
    assert all(map(np.array_equal, clip.read([0, 9]), again.read([0, 9])))
    assert draw_clip(seed + 1).items != clip.items


@given(clips)
def test_items_move_through_cells_of_their_own(clip: Clip) -> None:
    assert 6 <= len(clip.items) <= 8 == len({item.colour for item in clip.items}) + 8 - len(clip.items)
    cells = [(item.row, item.column) for item in (*clip.items, *clip.later)]
    assert len(set(cells)) == len(cells) == 2 * len(clip.items)
    assert clip.at(0) == clip.items and len(clip) == FRAMES
    for index, (item, later) in enumerate(zip(clip.items, clip.later, strict=True)):
        assert abs(item.row - later.row) + abs(item.column - later.column) == 1
        assert clip.at(FRAMES - 1)[index].box == pytest.approx(later.box)
        for frame in (0, 10, FRAMES - 1):
            left, top, right, bottom = (GRID * edge for edge in clip.at(frame)[index].box)
            assert min(item.column, later.column) <= left + 1e-9 and right - 1e-9 <= max(item.column, later.column) + 1
            assert min(item.row, later.row) <= top + 1e-9 and bottom - 1e-9 <= max(item.row, later.row) + 1


@given(clips)
def test_digits_are_seen_in_their_moments_alone(clip: Clip) -> None:
    """Other digits change the pixels of these frames, and only there; the frames that are sampled show none."""
    other = other_digits(clip)
    assert all(map(np.array_equal, clip.read(SAMPLED), other.read(SAMPLED)))
    moments = {frame for shown in clip.shown for frame in shown}
    some = sorted({min(moments), max(moments), *range(0, FRAMES, 5)})
    for frame, pixels, changed in zip(some, clip.read(some), other.read(some), strict=True):
        differs = (pixels != changed).any(-1)
        expected = np.zeros_like(differs)
        for item, shown in zip(clip.at(frame), clip.shown, strict=True):
            if frame in shown:
                left, top, right, bottom = (edge * len(pixels) for edge in item.box)
                area = slice(int(top), int(np.ceil(bottom))), slice(int(left), int(np.ceil(right)))
                assert differs[area].any()
                expected[area] = True
        assert not (differs & ~expected).any()


@given(clips)
def test_questions_have_one_answer_throughout(clip: Clip) -> None:
    """Every object is asked for its digit and its shape, and for its row or its column: the one that stays."""
    digits, others = questions(clip, "attribute"), questions(clip, "low-res")
    assert [question.item for question in digits] == list(clip.items)
    assert len(others) == 2 * len(clip.items) and not questions(clip, "conjunction")
    later = dict(zip(clip.items, clip.later, strict=True))
    for question in (*digits, *others):
        assert getattr(later[question.item], question.about) == getattr(question.item, question.about)


def test_a_clip_is_the_same_at_any_size() -> None:
    small, large = draw_clip(3), draw_clip(3, 576)
    assert large.size == (576, 576) and large.items == small.items and large.shown == small.shown
    one, other = (next(clip.read([9])).astype(float) for clip in (small, large))
    coarse = other.reshape(192, 3, 192, 3, 3).mean((1, 3))
    assert abs(coarse - one).mean() < 6 < abs(coarse - np.asarray(draw_scene(3).image, float)).mean()
