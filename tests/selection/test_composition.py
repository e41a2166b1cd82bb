"""Algebra of policies, on both grids."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexkit.errors import PolicyError
from flexkit.selection import (
    Border,
    Center,
    Complement,
    Dilated,
    Everything,
    Intersection,
    Nothing,
    Policy,
    Pooled,
    Random,
    Threshold,
    TopK,
    TopP,
    Union,
    resample_nearest,
)
from tests.selection import reference
from tests.selection.reference import each_map, maps

SIZES = st.tuples(st.integers(1, 15), st.integers(1, 15))
SIMPLE = st.sampled_from(
    [TopK(3), Threshold(0.5), TopP(0.5), Everything(), Nothing(), Random(0.3), Center(4), Border()]
)
POLICIES = st.recursive(
    SIMPLE,
    lambda parts: st.one_of(
        st.builds(Union, parts, parts),
        st.builds(Intersection, parts, parts),
        st.builds(Complement, parts),
        st.builds(Pooled, parts, st.integers(1, 9)),
        st.builds(Dilated, parts, st.integers(1, 3)),
    ),
    max_leaves=4,
)


def same(one: Policy, other: Policy, scores: Tensor, size: tuple[int, int]) -> bool:
    return torch.equal(one(scores), other(scores)) and torch.equal(one.select(scores, size), other.select(scores, size))


@given(POLICIES, POLICIES, maps(), SIZES)
def test_operators_are_set_operations(a: Policy, b: Policy, scores: Tensor, size: tuple[int, int]) -> None:
    assert torch.equal((a | b)(scores), a(scores) | b(scores))
    assert torch.equal((a & b)(scores), a(scores) & b(scores))
    assert torch.equal((~a)(scores), ~a(scores))
    assert torch.equal((a | b).select(scores, size), a.select(scores, size) | b.select(scores, size))
    assert torch.equal((a & b).select(scores, size), a.select(scores, size) & b.select(scores, size))
    assert torch.equal((~a).select(scores, size), ~a.select(scores, size))


def test_compositions_compose_what_the_parts_select_on_the_high_res_grid() -> None:
    pooled, scores, size = TopK(5).pooled(9), torch.rand(12, 12), (36, 36)
    direct = pooled.select(scores, size)
    assert not torch.equal(direct, resample_nearest(pooled(scores), size))
    for composed in (pooled | Nothing(), Nothing() | pooled, pooled & Everything(), ~~pooled):
        assert torch.equal(composed.select(scores, size), direct)
    assert torch.equal((~pooled).select(scores, size), ~direct)


@given(POLICIES, POLICIES, POLICIES, maps(), SIZES)
def test_algebra(a: Policy, b: Policy, c: Policy, scores: Tensor, size: tuple[int, int]) -> None:
    for left, right in (
        (~(a | b), ~a & ~b),
        (~(a & b), ~a | ~b),
        (~~a, a),
        (a | a, a),
        (a & a, a),
        (a & (b | c), (a & b) | (a & c)),
        (a | (a & b), a),
        (a | Nothing(), a),
        (a & Everything(), a),
        (a & ~a, Nothing()),
    ):
        assert same(left, right, scores, size)


@given(POLICIES, maps(), st.integers(1, 9))
def test_pooling_on_the_low_res_grid(policy: Policy, scores: Tensor, size: int) -> None:
    expected = each_map(
        lambda kept: reference.nearest(reference.pool(kept, size), reference.shape_of(kept)), policy(scores)
    )
    assert torch.equal(policy.pooled(size)(scores), expected)


@given(POLICIES, maps(), st.integers(1, 9), SIZES)
def test_pooling_to_the_high_res_grid(policy: Policy, scores: Tensor, blocks: int, size: tuple[int, int]) -> None:
    expected = each_map(lambda kept: reference.nearest(reference.pool(kept, blocks), size), policy(scores))
    assert torch.equal(policy.pooled(blocks).select(scores, size), expected)


@given(SIMPLE, maps(), st.integers(1, 9), SIZES)
def test_pooling_only_adds(policy: Policy, scores: Tensor, blocks: int, size: tuple[int, int]) -> None:
    assert not (policy.select(scores, size) & ~policy.pooled(blocks).select(scores, size)).any()


@given(POLICIES, maps(), st.integers(1, 8), SIZES)
def test_dilation(policy: Policy, scores: Tensor, cells: int, size: tuple[int, int]) -> None:
    expected = each_map(lambda kept: reference.dilate(kept, cells), policy(scores))
    grown = policy.dilated(cells)
    assert torch.equal(grown(scores), expected)
    assert torch.equal(grown.select(scores, size), each_map(lambda m: reference.nearest(m, size), expected))


def test_dilation_further_than_the_short_side() -> None:
    assert Center(1).dilated(2)(torch.zeros(1, 7)).int().tolist() == [[0, 1, 1, 1, 1, 1, 0]]
    assert Center(1).dilated(10**9)(torch.zeros(1, 7)).all()


@given(POLICIES, maps(), st.integers(1, 3), SIZES)
def test_dilation_covers_what_a_pooled_policy_selects(
    policy: Policy, scores: Tensor, cells: int, size: tuple[int, int]
) -> None:
    pooled = policy.pooled(5)
    assert not (pooled.select(scores, size) & ~pooled.dilated(cells).select(scores, size)).any()


@given(maps(), SIZES)
def test_selection_is_nearest_upsampling(scores: Tensor, size: tuple[int, int]) -> None:
    expected = each_map(lambda kept: reference.nearest(kept, size), TopK(3)(scores))
    assert torch.equal(TopK(3).select(scores, size), expected)


def test_operators_take_functions_on_either_side() -> None:
    def positive(scores: Tensor) -> Tensor:
        return scores > 0

    scores = torch.tensor([[-1.0, 1.0, 2.0]])
    assert (positive & TopK(1))(scores).tolist() == [[False, False, True]]
    assert (TopK(1) & positive)(scores).tolist() == [[False, False, True]]
    assert (positive | TopK(1))(scores).tolist() == [[False, True, True]]
    assert (TopK(3) | positive)(scores).all()
    assert repr(positive & TopK(1)) == f"Intersection(left=FunctionPolicy({positive.__qualname__}), right=TopK(k=1))"
    assert Complement(positive)(scores).tolist() == [[True, False, False]]  # type: ignore[arg-type]
    assert Pooled(positive, 1)(scores).all()  # type: ignore[arg-type]
    assert Dilated(positive, 1)(scores).all()  # type: ignore[arg-type]


def test_operators_refuse_the_rest() -> None:
    with pytest.raises(PolicyError, match="expected a policy"):
        TopK(1) | 3  # type: ignore[operator]
    with pytest.raises(PolicyError, match="expected an instance"):
        TopK & TopK(1)  # type: ignore[operator]


def test_compositions_are_values() -> None:
    build = (TopK(1) | Threshold(0.5)).pooled(9) & ~Border(1).dilated(2)
    again = (TopK(1) | Threshold(0.5)).pooled(9) & ~Border(1).dilated(2)
    assert build == again and hash(build) == hash(again)
    assert build != (TopK(2) | Threshold(0.5)).pooled(9) & ~Border(1).dilated(2)


@pytest.mark.parametrize(
    "compose", [lambda p: ~p, lambda p: p.pooled(2), lambda p: p.dilated(1), lambda p: p & Center(1)]
)
def test_a_composition_reads_scores_if_a_part_does(compose) -> None:  # type: ignore[no-untyped-def]
    assert compose(TopK(1)).uses_scores
    assert not compose(Border()).uses_scores


@pytest.mark.parametrize("wrong", [0, 1.5, True, None])
def test_wrong_morphology(wrong: object) -> None:
    with pytest.raises(PolicyError, match="Pooled: size must be an int of at least 1"):
        TopK(1).pooled(wrong)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="Dilated: cells must be an int of at least 1"):
        TopK(1).dilated(wrong)  # type: ignore[arg-type]


@given(POLICIES)
def test_no_maps_at_all(policy: Policy) -> None:
    assert policy(torch.zeros(0, 5, 4)).shape == (0, 5, 4)
    assert policy.select(torch.zeros(2, 0, 5, 4), (10, 8)).shape == (2, 0, 10, 8)
