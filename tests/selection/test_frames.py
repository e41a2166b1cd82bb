"""Policies of videos: which frames, how many cells of all of them, and what composes with what."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexkit import Border, Everything, Frames, PolicyError, Random, Threshold, TopK, TopP
from flexkit.errors import ConfigError
from flexkit.selection import AttentionMapSelector, Center, Policy, Schedule, within_budget

SPATIAL = (TopK(2), TopK(0.5), Threshold(0.3), TopP(0.5), TopK(1).dilated(1), Threshold(0.5).pooled(2), Center(2))


@st.composite
def videos(draw: st.DrawFn) -> Tensor:
    """Maps ``(maps, frames, rows, columns)`` without ties."""
    shape = [draw(st.integers(1, 3)), *(draw(st.integers(1, 4)) for _ in range(3))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.rand(shape, generator=generator, dtype=torch.float64)


@given(videos(), st.sampled_from([*SPATIAL, Random(2), ~Border(), TopK(2) | Center(1)]))
def test_a_policy_of_pictures_judges_every_frame_on_its_own(scores: Tensor, policy: Policy) -> None:
    alone = torch.stack([policy(frame) for video in scores for frame in video]).view(scores.shape)
    assert torch.equal(policy(scores), alone)


@given(videos(), st.integers(1, 5))
def test_the_best_frames(scores: Tensor, k: int) -> None:
    mask = Frames(k)(scores)
    sums = scores.sum((-2, -1))
    expected = sums >= sums.topk(min(k, scores.shape[1])).values[:, -1:]
    assert torch.equal(mask, expected[..., None, None].expand(scores.shape))


@given(videos(), st.sampled_from(SPATIAL))
def test_all_frames_as_one_map(scores: Tensor, policy: Policy) -> None:
    below = policy(scores.flatten(1, 2))
    assert torch.equal(policy.over_frames()(scores), below.view(scores.shape))
    assert torch.equal(policy.over_frames()(scores[:, :1]), policy(scores[:, :1]))  # a picture


@given(videos(), st.sampled_from([*SPATIAL, *(policy.over_frames() for policy in SPATIAL), Frames(2), Frames(0.5)]))
def test_at_most_so_many(scores: Tensor, policy: Policy) -> None:
    """What a policy promises of a grid holds; alone, and composed."""
    grid = tuple(scores.shape[1:])
    for each in (policy, policy & TopK(1), policy | Random(1), Frames(1) & policy, ~policy):
        assert int(each(scores).flatten(1).sum(-1).max()) <= each.most(grid)
    assert Schedule({0: policy, 2: TopK(1)}).most(grid) >= policy.most(grid)


@given(videos(), st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)), st.integers(1, 20))
def test_the_selector_selects_in_videos(scores: Tensor, zoom: tuple[int, int, int], budget: int) -> None:
    maps, *grid = scores.shape
    attention = scores.view(1, 1, maps, -1).expand(1, 2, -1, -1)
    selector = AttentionMapSelector(Frames(2) & TopK(2), reduce="mean")
    mask = selector(attention, tuple(grid), zoom)
    cells = (Frames(2) & TopK(2))(scores)
    for axis, factor in enumerate(zoom, start=1):
        cells = cells.repeat_interleave(factor, dim=axis)
    assert torch.equal(mask[0], cells)
    bounded = AttentionMapSelector(Everything(), budget=budget)
    mask = bounded(attention, tuple(grid), zoom)
    assert mask.flatten(2).sum(-1).unique().tolist() == [min(budget, mask[0, 0].numel())]
    assert int(mask[0, 0].sum()) <= bounded.most(tuple(grid), zoom)


@given(videos())
def test_a_picture_is_one_frame(scores: Tensor) -> None:
    picture = scores[None, :, 0]
    for policy in (Frames(1), TopK(2).over_frames(), Frames(3) & TopK(1)):
        selector = AttentionMapSelector(policy)
        as_video = selector.select(picture[:, :, None], (1, 2, 2))
        assert torch.equal(selector.select(picture, 2), as_video[:, :, 0])


def test_a_budget_of_all_frames() -> None:
    selected, scores = torch.ones(2, 1, 3, dtype=torch.bool), torch.tensor([[[1.0, 5.0, 2.0]], [[4.0, 3.0, 0.0]]])
    assert within_budget(selected, scores, 2).sum((-2, -1)).tolist() == [2, 2]
    assert within_budget(selected, scores, 2, axes=3).nonzero().tolist() == [[0, 0, 1], [1, 0, 0]]


def test_scores_that_cannot_be_ranked() -> None:
    scores = torch.tensor([[[torch.nan]], [[1.0]], [[torch.inf]]])
    assert Frames(1)(scores).flatten().tolist() == [False, False, True]
    assert Frames(2)(scores).flatten().tolist() == [False, True, True]


def test_errors() -> None:
    for k in (0, 1.5, True, "2"):
        with pytest.raises(PolicyError, match="k must be"):
            Frames(k)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match=r"expected \(\.\.\., frames, rows, columns\)"):
        Frames(1)(torch.rand(2, 2))
    with pytest.raises(ConfigError, match="size must be"):
        TopK(1).select(torch.rand(2, 2), (1, 2, 2))
    with pytest.raises(ConfigError, match="grid must be"):
        AttentionMapSelector().scores(torch.rand(1, 1, 1, 4), (1, 1, 2, 2))
    with pytest.raises(ConfigError, match="zoom must be"):
        AttentionMapSelector().select(torch.rand(1, 1, 2, 2), (1, 1, 1, 1))
