import copy
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexkit.errors import PolicyError
from flexkit.selection import AttentionMapSelector, Border, FunctionPolicy, Nothing, Policy, Schedule, TopK


@given(st.dictionaries(st.integers(0, 40), st.integers(1, 9).map(TopK), min_size=1), st.integers(0, 45))
def test_the_last_policy_that_has_begun_holds(policies: dict[int, Policy], layer: int) -> None:
    expected: Policy = Nothing()
    for index in range(layer + 1):
        expected = policies.get(index, expected)
    assert Schedule(policies).at(layer) == expected


def test_a_schedule_is_a_value() -> None:
    schedule = Schedule({16: TopK(8), 8: TopK(16)})
    assert schedule == Schedule({8: TopK(16), 16: TopK(8)}) != Schedule({8: TopK(16)})
    assert hash(schedule) == hash(Schedule({8: TopK(16), 16: TopK(8)}))
    assert repr(schedule) == "Schedule({8: TopK(k=16), 16: TopK(k=8)})"
    assert copy.deepcopy(schedule) == schedule == pickle.loads(pickle.dumps(schedule))


def test_a_schedule_does_not_change() -> None:
    given_policies: dict[int, Policy] = {8: TopK(16)}
    schedule = Schedule(given_policies)
    given_policies[0] = schedule.policies[0] = TopK(1)
    assert schedule.policies == {8: TopK(16)}
    with pytest.raises(FrozenInstanceError):
        schedule._items = ()  # type: ignore[misc]


def test_functions_become_policies() -> None:
    def positive(scores: Tensor) -> Tensor:
        return scores > 0

    assert Schedule({3: positive}).at(3) == FunctionPolicy(positive)


def test_a_schedule_reads_scores_if_a_policy_does() -> None:
    assert Schedule({0: Border(), 3: TopK(1)}).uses_scores
    assert not Schedule({0: Border()}).uses_scores


@pytest.mark.parametrize("wrong", [{}, None, [(8, TopK(1))], {-1: TopK(1)}, {1.0: TopK(1)}, {True: TopK(1)}])
def test_wrong_schedules(wrong: object) -> None:
    with pytest.raises(PolicyError, match="Schedule: "):
        Schedule(wrong)  # type: ignore[arg-type]


def test_wrong_policies_in_a_schedule() -> None:
    with pytest.raises(PolicyError, match="expected a policy"):
        Schedule({8: 0.5})  # type: ignore[dict-item]
    with pytest.raises(PolicyError, match="expected a policy"):
        Schedule({8: Schedule({8: TopK(1)})})  # type: ignore[dict-item]


def test_the_selector_asks_for_the_layer() -> None:
    selector = AttentionMapSelector(Schedule({8: TopK(2), 16: TopK(1)}))
    scores = torch.rand(1, 1, 3, 3)
    assert [selector.select(scores, 2, layer=layer).sum().item() for layer in (7, 8, 15, 16)] == [0, 8, 8, 4]
    assert selector(scores.flatten(-2)[:, None], (3, 3), 2, layer=31).sum() == 4
    with pytest.raises(PolicyError, match="differs by layer: pass layer="):
        selector.select(scores, 2)
