import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from flexkit.errors import PolicyError
from flexkit.selection import Border, Center, Everything, Nothing, Policy, Random, Threshold, TopK, TopP
from tests.selection import reference
from tests.selection.reference import DTYPES, MASSES, NUMBERS, WILD, each_map, maps

SHARES = st.integers(1, 16).map(lambda n: n / 16)
COUNTS = st.integers(1, 60) | SHARES
SIXTEENTHS = st.integers(0, 15).map(lambda n: n / 16)
BORDERS = st.integers(1, 5)

POLICIES = st.one_of(
    COUNTS.map(TopK),
    SIXTEENTHS.map(Threshold),
    SHARES.map(TopP),
    st.builds(Random, COUNTS, st.integers(0, 3)),
    COUNTS.map(Center),
    BORDERS.map(Border),
    st.just(Everything()),
    st.just(Nothing()),
)


@given(maps(), COUNTS)
def test_top_k(scores: Tensor, k: int | float) -> None:
    assert torch.equal(TopK(k)(scores), each_map(partial(reference.top_k, k=k), scores))


@given(maps(WILD), st.integers(1, 60))
def test_top_k_of_wild_scores_ranks_nan_last(scores: Tensor, k: int) -> None:
    mask = TopK(k)(scores)
    assert torch.equal(mask, each_map(partial(reference.top_k, k=k), scores))
    assert mask.sum((-2, -1)).eq(min(k, scores[0].numel())).all()


@given(maps(NUMBERS | st.just(math.nan)), SIXTEENTHS)
def test_threshold(scores: Tensor, value: float) -> None:
    assert torch.equal(Threshold(value)(scores), each_map(partial(reference.threshold, value=value), scores))


@given(maps(MASSES), SHARES)
def test_top_p(scores: Tensor, p: float) -> None:
    assert torch.equal(TopP(p)(scores), each_map(partial(reference.top_p, p=p), scores))


@given(maps(MASSES), SHARES)
def test_top_p_ignores_negative_scores_and_nan(masses: Tensor, p: float) -> None:
    signed = torch.where(masses == 0, -3.0, masses)
    missing = torch.where(masses == 0, math.nan, masses)
    assert torch.equal(TopP(p)(signed), TopP(p)(masses))
    assert torch.equal(TopP(p)(missing), TopP(p)(masses))


@given(maps(), COUNTS)
def test_center(scores: Tensor, k: int | float) -> None:
    assert torch.equal(Center(k)(scores), each_map(partial(reference.center, k=k), scores))


@given(maps(), BORDERS)
def test_border(scores: Tensor, width: int) -> None:
    assert torch.equal(Border(width)(scores), each_map(partial(reference.border, width=width), scores))


@given(maps(), COUNTS, st.integers(0, 5))
def test_random_draws_the_same_cells_for_every_map(scores: Tensor, k: int | float, seed: int) -> None:
    mask = Random(k, seed)(scores)
    assert mask.sum((-2, -1)).eq(reference.cells_of(k, scores[0].numel())).all()
    assert torch.equal(mask[0], Random(k, seed)(torch.zeros_like(scores[0])))


def test_random_depends_on_its_seed_only() -> None:
    scores = torch.zeros(20, 20)
    torch.manual_seed(1)
    first = Random(50, seed=3)(scores)
    torch.manual_seed(2)
    assert torch.equal(first, Random(50, seed=3)(scores))
    assert not torch.equal(first, Random(50, seed=4)(scores))


def test_random_covers_the_grid_evenly() -> None:
    hits = sum(Random(8, seed)(torch.zeros(4, 4)).int() for seed in range(200))
    assert isinstance(hits, Tensor)
    assert hits.min() > 60 and hits.max() < 140


def test_center_follows_the_proportions_of_the_grid() -> None:
    assert Center(4)(torch.zeros(4, 8)).int().tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert Center(1)(torch.zeros(2, 2)).int().tolist() == [[1, 0], [0, 0]]


@given(maps(WILD), POLICIES, DTYPES)
def test_a_batch_selects_what_its_maps_select_alone(scores: Tensor, policy: Policy, dtype: torch.dtype) -> None:
    scores = scores.to(dtype)
    alone = torch.stack([policy(one) for one in scores])
    assert torch.equal(policy(scores), alone)
    assert torch.equal(policy(scores[:, None]), alone[:, None])


@given(POLICIES, DTYPES)
def test_no_maps_at_all(policy: Policy, dtype: torch.dtype) -> None:
    assert policy(torch.zeros(2, 0, 3, 4, dtype=dtype)).shape == (2, 0, 3, 4)


@given(maps(), DTYPES, COUNTS, SIXTEENTHS)
def test_half_precisions_select_like_float32(scores: Tensor, dtype: torch.dtype, k: int | float, value: float) -> None:
    for policy in (TopK(k), Threshold(value)):
        assert torch.equal(policy(scores.to(dtype)), policy(scores))


@given(maps(), st.tuples(COUNTS, COUNTS), st.integers(0, 3))
def test_counts_are_monotone(scores: Tensor, counts: tuple[int | float, int | float], seed: int) -> None:
    fewer, more = sorted(counts, key=lambda k: reference.cells_of(k, scores[0].numel()))
    for narrow, wide in (
        (TopK(fewer), TopK(more)),
        (Center(fewer), Center(more)),
        (Random(fewer, seed), Random(more, seed)),
    ):
        assert not (narrow(scores) & ~wide(scores)).any()


@given(maps(WILD), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_a_lower_threshold_selects_a_superset(scores: Tensor, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert not (Threshold(high)(scores) & ~Threshold(low)(scores)).any()


@given(maps(WILD), st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True))
def test_a_larger_p_selects_a_superset(scores: Tensor, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert not (TopP(low)(scores) & ~TopP(high)(scores)).any()


@given(maps(), SIXTEENTHS, st.sampled_from([0.25, 2.0, 8.0]), st.integers(-4, 4))
def test_threshold_does_not_see_scale_or_offset(scores: Tensor, value: float, scale: float, offset: int) -> None:
    assert torch.equal(Threshold(value)(scores), Threshold(value)(scores * scale + offset))


@given(st.sampled_from([0.0, -1.0, 0.1, 6e4, math.inf, -math.inf, math.nan]), SIXTEENTHS, DTYPES)
def test_threshold_selects_nothing_of_a_constant_map(value: float, threshold: float, dtype: torch.dtype) -> None:
    assert not Threshold(threshold)(torch.full((2, 3, 4), value, dtype=dtype)).any()


def test_threshold_counts_infinite_scores_as_the_largest_finite_ones() -> None:
    scores = torch.tensor([[math.inf, 1.0, -math.inf, math.nan]])
    assert Threshold(0.75)(scores).tolist() == [[True, False, False, False]]
    assert Threshold(0.25)(scores).tolist() == [[True, True, False, False]]
    assert Threshold(0.5)(torch.tensor([[-3e38, 3e38, 0.0]])).tolist() == [[False, True, False]]


def test_threshold_is_strict_at_the_published_value() -> None:
    assert Threshold(48 / 255)(torch.tensor([[0.0, 48.0, 49.0, 255.0]], dtype=torch.float64)).tolist() == [
        [False, False, True, True]
    ]


def test_top_p_of_a_map_without_mass_selects_nothing() -> None:
    assert not TopP(1.0)(torch.tensor([[0.0, -1.0, math.nan, -math.inf]])).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_top_p_of_extreme_masses(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    assert TopP(1.0)(torch.full((5, 5), largest, dtype=dtype)).all()
    assert TopP(0.5)(torch.full((4, 4), largest, dtype=dtype)).sum() == 8
    infinite = torch.tensor([[math.inf, 1.0, math.inf, 0.0]], dtype=dtype)
    assert TopP(0.75)(infinite).tolist() == [[True, False, True, False]]


@given(maps(MASSES))
def test_top_p_of_everything_is_every_cell_with_mass(masses: Tensor) -> None:
    assume(masses.sum() > 0)
    assert torch.equal(TopP(1.0)(masses), masses > 0)


@given(maps(WILD))
def test_everything_and_nothing(scores: Tensor) -> None:
    assert Everything()(scores).all()
    assert not Nothing()(scores).any()


@pytest.mark.parametrize("policy", [Everything(), Nothing(), Random(2), Center(2), Border()])
def test_policies_that_do_not_read_scores(policy: Policy) -> None:
    assert not policy.uses_scores
    blank = torch.full((2, 5, 6), math.nan)
    assert torch.equal(policy(blank), policy(torch.rand(2, 5, 6)))


@pytest.mark.parametrize("policy", [TopK(2), Threshold(0.5), TopP(0.5)])
def test_policies_that_read_scores(policy: Policy) -> None:
    assert policy.uses_scores


@pytest.mark.parametrize("wrong", [0, -1, 0.0, 1.5, -0.5, math.nan, True, "3", None])
def test_wrong_counts(wrong: object) -> None:
    for policy in (TopK, Center, Random):
        with pytest.raises(PolicyError, match=rf"{policy.__name__}: k must be .*got {wrong!r}"):
            policy(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [-0.1, 1.0, 2, math.nan, True, "0.5", None])
def test_wrong_thresholds(wrong: object) -> None:
    with pytest.raises(PolicyError, match="Threshold: value must be"):
        Threshold(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [0.0, 0, 1.1, math.nan, True, "0.5", None])
def test_wrong_shares(wrong: object) -> None:
    with pytest.raises(PolicyError, match="TopP: p must be"):
        TopP(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [0, 1.0, True, None])
def test_wrong_border(wrong: object) -> None:
    with pytest.raises(PolicyError, match="Border: width must be an int of at least 1"):
        Border(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [-1, 1.0, False, None])
def test_wrong_seed(wrong: object) -> None:
    with pytest.raises(PolicyError, match="Random: seed must be an int of at least 0"):
        Random(3, seed=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_the_largest_seeds(seed: int) -> None:
    assert int(Random(3, seed)(torch.zeros(4, 4)).sum()) == 3


@pytest.mark.parametrize("wrong", [2**64, 10**30])
def test_a_seed_that_torch_has_not(wrong: int) -> None:
    with pytest.raises(PolicyError, match=rf"Random: seed must be below 2\*\*64, got {wrong}"):
        Random(3, seed=wrong)


ODD = [
    math.nan,
    math.inf,
    -math.inf,
    10**30,
    2**63,
    5e-324,
    True,
    np.int64(2),
    np.float32(0.5),
    np.float64(0.5),
    2j,
    "1",
]
NUMBERED = {
    "TopK": TopK,
    "Center": Center,
    "Random": Random,
    "seed": partial(Random, 1),
    "Threshold": Threshold,
    "TopP": TopP,
    "Border": Border,
    "pooled": TopK(1).pooled,
    "dilated": TopK(1).dilated,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", NUMBERED)
@pytest.mark.parametrize("value", ODD, ids=repr)
def test_odd_numbers_are_refused_or_work(kind: str, value: Any) -> None:
    try:
        policy = NUMBERED[kind](value)
    except PolicyError as error:
        assert repr(value) in str(error)
        return
    for scores in (torch.rand(2, 3, 4), torch.rand(1, 5), torch.rand(5, 1), torch.full((2, 2), math.nan)):
        assert policy(scores).shape == scores.shape
        assert policy.select(scores, (6, 7)).shape == (*scores.shape[:-2], 6, 7)
