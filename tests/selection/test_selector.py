import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexkit.errors import ConfigError, PolicyError
from flexkit.selection import (
    AttentionMapSelector,
    Border,
    Center,
    Everything,
    Nothing,
    Policy,
    Random,
    Threshold,
    TopK,
    TopP,
    resample_nearest,
    within_budget,
)
from tests.selection import reference
from tests.selection.reference import maps

ZOOMS = st.integers(1, 3) | st.tuples(st.integers(1, 3), st.integers(1, 3))
BUDGETS = st.integers(1, 80) | st.integers(1, 16).map(lambda n: n / 16)


def attention_of(batch: int, heads: int, queries: int, cells: int) -> Tensor:
    return torch.randn(batch, heads, queries, cells, dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("heads", [None, (0,), [3, 1]])
def test_maps_head_by_head(reduce: str, heads: list[int] | None) -> None:
    attention = attention_of(2, 4, 3, 3 * 5)
    scores = AttentionMapSelector(reduce=reduce, heads=heads).scores(attention, (3, 5))  # type: ignore[arg-type]
    how = {"sum": sum, "max": max, "mean": lambda values: sum(values) / len(values)}[reduce]
    for b in range(2):
        for q in range(3):
            for i in range(3):
                for j in range(5):
                    expected = how([attention[b, h, q, 5 * i + j].item() for h in heads or range(4)])
                    assert scores[b, q, i, j].item() == pytest.approx(expected, rel=1e-12)


def test_margins_are_zeroed_item_by_item() -> None:
    attention = attention_of(2, 2, 3, 5 * 6)
    selector = AttentionMapSelector()
    plain = selector.scores(attention, (5, 6))
    scores = selector.scores(attention, (5, 6), torch.tensor([[1, 0], [0, 2]]))
    assert torch.equal(scores[0, :, 1:4], plain[0, :, 1:4]) and torch.equal(scores[1, :, :, 2:4], plain[1, :, :, 2:4])
    assert not scores[0, :, [0, 4]].any() and not scores[1, :, :, [0, 1, 4, 5]].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_maps_are_at_least_float32(dtype: torch.dtype) -> None:
    attention = torch.full((1, 3, 1, 4), 40000.0, dtype=dtype)
    scores = AttentionMapSelector().scores(attention, (2, 2))
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(scores, attention.to(scores.dtype).sum(1).reshape(1, 1, 2, 2))


@given(maps(), ZOOMS, st.sampled_from([TopK(3), Threshold(0.4), TopP(0.5), Border(), TopK(2).pooled(2)]))
def test_selecting_is_the_policy_on_the_zoomed_grid(
    scores: Tensor, zoom: int | tuple[int, int], policy: Policy
) -> None:
    down, across = (zoom, zoom) if isinstance(zoom, int) else zoom
    size = (down * scores.shape[-2], across * scores.shape[-1])
    selected = AttentionMapSelector(policy).select(scores[None], zoom)
    assert torch.equal(selected, policy.select(scores, size)[None])


def test_forward_is_scores_then_select() -> None:
    attention, margins = attention_of(2, 4, 3, 12), torch.tensor([[1, 0], [0, 0]])
    selector = AttentionMapSelector(TopK(2), heads=[1, 2], reduce="max", budget=7)
    expected = selector.select(selector.scores(attention, (3, 4), margins), (2, 3))
    assert torch.equal(selector(attention, (3, 4), (2, 3), margins=margins), expected)
    assert expected.shape == (2, 3, 6, 12) and expected.sum((-2, -1)).eq(7).all()
    assert selector(attention, (3, 4)).shape == (2, 3, 3, 4)


def test_a_batch_selects_what_its_items_select_alone() -> None:
    attention, margins = attention_of(3, 2, 4, 12), torch.tensor([[1, 0], [0, 1], [0, 0]])
    for policy in (TopK(0.3), Threshold(0.5).pooled(2), TopP(0.4), Random(3)):
        selector = AttentionMapSelector(policy, budget=20)
        alone = [selector(attention[b : b + 1], (3, 4), 3, margins=margins[b : b + 1]) for b in range(3)]
        assert torch.equal(selector(attention, (3, 4), 3, margins=margins), torch.cat(alone))


@given(maps(), ZOOMS, BUDGETS, st.sampled_from([TopK(4), Threshold(0.3), Everything(), Nothing()]))
def test_budgets_keep_the_best(
    scores: Tensor, zoom: int | tuple[int, int], budget: int | float, policy: Policy
) -> None:
    free = AttentionMapSelector(policy).select(scores[None], zoom)[0]
    bounded = AttentionMapSelector(policy, budget=budget).select(scores[None], zoom)[0]
    expected = [reference.capped(mask, grid, budget) for mask, grid in zip(free.tolist(), scores.tolist(), strict=True)]
    assert bounded.tolist() == expected


@given(maps(reference.WILD), BUDGETS)
def test_budgets_hold_for_wild_scores(scores: Tensor, budget: int | float) -> None:
    bounded = AttentionMapSelector(Everything(), budget=budget).select(scores[None], 2)
    bound = reference.cells_of(budget, 4 * scores[0].numel())
    assert bounded.sum((-2, -1)).eq(bound).all()


def test_a_budget_drops_missing_scores_first() -> None:
    scores = torch.tensor([[math.nan, -math.inf, 1.0]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    assert within_budget(everything, scores, 2).tolist() == [[False, True, True]]


def test_a_fully_masked_row_selects_nothing_by_threshold() -> None:
    attention = torch.full((1, 2, 1, 9), math.nan)
    margins = torch.tensor([[1, 0]])
    assert not AttentionMapSelector()(attention, (3, 3), 3).any()
    assert not AttentionMapSelector()(attention, (3, 3), 3, margins=margins).any()


def test_no_queries() -> None:
    attention = torch.zeros(2, 4, 0, 9)
    for policy in (TopK(2), Threshold(0.3).pooled(9), TopP(0.3).dilated(1)):
        selector = AttentionMapSelector(policy, budget=5)
        assert selector(attention, (3, 3), 2).shape == (2, 0, 6, 6)


def test_the_selection_carries_no_gradient_and_the_scores_do() -> None:
    attention = attention_of(1, 2, 1, 9).requires_grad_()
    selector = AttentionMapSelector(lambda scores: torch.from_numpy(scores.numpy() > 0.1))
    scores = selector.scores(attention, (3, 3))
    assert scores.requires_grad and not selector.select(scores, 2).requires_grad


def test_a_selector_has_no_state() -> None:
    selector = AttentionMapSelector(TopK(2), heads=[0])
    assert not selector.state_dict() and not list(selector.parameters())
    assert copy.deepcopy(selector).policy == selector.policy
    assert repr(selector) == "AttentionMapSelector(policy=TopK(k=2), reduce='sum', heads=(0,), budget=None)"


def test_uses_scores() -> None:
    assert AttentionMapSelector().uses_scores
    assert not AttentionMapSelector(Random(3)).uses_scores
    assert AttentionMapSelector(Random(3), budget=2).uses_scores


@given(maps(largest=5), st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_resampling_any_dtype(scores: Tensor, size: tuple[int, int]) -> None:
    expected = [reference.nearest(grid, size) for grid in scores.tolist()]
    assert resample_nearest(scores, size).tolist() == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"reduce": "median"},
        {"heads": []},
        {"heads": 0},
        {"heads": [[0]]},
        {"heads": [1, 1]},
        {"heads": [-1]},
        {"heads": [0.0]},
        {"budget": 0},
        {"budget": 1.5},
        {"budget": True},
    ],
)
def test_wrong_settings(settings: dict[str, object]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=f"{name} must be"):
        AttentionMapSelector(**settings)  # type: ignore[arg-type]


def test_wrong_policy() -> None:
    with pytest.raises(PolicyError, match="expected a policy"):
        AttentionMapSelector(0.5)  # type: ignore[arg-type]


def test_a_head_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"heads \(0, 4\) were chosen, the attention has 4: 0 to 3"):
        AttentionMapSelector(heads=[0, 4]).scores(attention_of(1, 4, 1, 4), (2, 2))


@pytest.mark.parametrize(
    "attention", [torch.rand(1, 2, 3, 5), torch.rand(1, 2, 4), torch.ones(1, 2, 3, 4, dtype=torch.long)]
)
def test_wrong_attention(attention: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"\(batch, heads, queries, 4\) for a grid of 2 x 2 cells"):
        AttentionMapSelector().scores(attention, (2, 2))


def test_margins_of_another_batch() -> None:
    with pytest.raises(ConfigError, match="margins are for 1 images, the attention for 2"):
        AttentionMapSelector().scores(attention_of(2, 1, 1, 4), (2, 2), torch.tensor([[0, 0]]))


@pytest.mark.parametrize("zoom", [0, (2, 0), (2, 2, 2, 2)])
def test_wrong_zooms(zoom: object) -> None:
    with pytest.raises(ConfigError, match="zoom must be"):
        AttentionMapSelector().select(torch.rand(1, 1, 2, 2), zoom)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "policy", [TopK(4).pooled(2), Threshold(0.5), TopP(0.5), Random(3), ~Center(0.5).dilated(1) | Border()]
)
def test_selection_compiles_without_a_break(policy: Policy) -> None:
    selector = AttentionMapSelector(policy, budget=10)
    compiled = torch.compile(partial(selector, grid=(3, 4), zoom=2), fullgraph=True, backend="eager")
    attention = attention_of(2, 3, 1, 12)
    assert torch.equal(compiled(attention), selector(attention, (3, 4), 2))
