import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexkit.errors import PolicyError
from flexkit.selection import (
    PUBLISHED_POLICY,
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
    Schedule,
    Threshold,
    TopK,
    TopP,
    Union,
    as_policy,
    policy_from_dict,
    policy_to_dict,
)

COUNTS = st.integers(1, 600) | st.floats(0, 1, exclude_min=True)
SIMPLE = st.one_of(
    st.builds(TopK, COUNTS),
    st.builds(Threshold, st.floats(0, 1, exclude_max=True)),
    st.builds(TopP, st.floats(0, 1, exclude_min=True)),
    st.builds(Random, COUNTS, st.integers(0, 99)),
    st.builds(Center, COUNTS),
    st.builds(Border, st.integers(1, 9)),
    st.just(Everything()),
    st.just(Nothing()),
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
    max_leaves=5,
)


@given(POLICIES | st.dictionaries(st.integers(0, 40), POLICIES, min_size=1, max_size=3).map(Schedule))
def test_round_trip_through_json(policy: Policy | Schedule) -> None:
    rebuilt = policy_from_dict(json.loads(json.dumps(policy_to_dict(policy))))
    assert rebuilt == policy and repr(rebuilt) == repr(policy)


def test_the_written_form() -> None:
    assert policy_to_dict(PUBLISHED_POLICY) == {
        "type": "Pooled",
        "policy": {"type": "Threshold", "value": 48 / 255},
        "size": 9,
    }
    assert policy_to_dict(Schedule({8: TopK(16)})) == {
        "type": "Schedule",
        "policies": {"8": {"type": "TopK", "k": 16}},
    }


def positive(scores: Tensor) -> Tensor:
    return scores > 0


@dataclass(frozen=True)
class Mine(Policy):
    def mask(self, scores: Tensor) -> Tensor:
        return scores > 0


class MyTopK(TopK):
    pass


@pytest.mark.parametrize(
    ("policy", "name"), [(as_policy(positive), "positive"), (Mine(), "Mine"), (MyTopK(3), "MyTopK")]
)
def test_custom_policies_are_named_but_not_rebuilt(policy: Policy, name: str) -> None:
    assert policy_to_dict(policy) == {"type": "custom", "name": name}
    assert policy_to_dict(~policy) == {"type": "Complement", "policy": {"type": "custom", "name": name}}
    for described in (
        policy_to_dict(policy),
        policy_to_dict(policy | TopK(1)),
        policy_to_dict(Schedule({0: policy})),
    ):
        with pytest.raises(PolicyError, match=rf"'{name}' is not one of flexkit's own .*pass policy="):
            policy_from_dict(described)


def test_a_namesake_is_custom() -> None:
    namesake = type("TopK", (Mine,), {})
    assert policy_to_dict(namesake())["type"] == "custom"


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (None, 'a mapping with a "type"'),
        ({}, 'a mapping with a "type"'),
        ({"type": 3}, 'a mapping with a "type"'),
        ({"type": "Policy"}, "'Policy' is not one of flexkit's own"),
        ({"type": "TopK"}, r"TopK: got the parameters \[\], expected: k"),
        ({"type": "TopK", "k": 3, "seed": 1}, r"TopK: got the parameters \['k', 'seed'\], expected: k"),
        ({"type": "Everything", "k": 3}, "expected: none"),
        ({"type": "TopK", "k": -3}, "k must be"),
        ({"type": "TopK", "k": {"type": "TopK", "k": 3}}, "k must be"),
        ({"type": "Complement", "policy": 3}, "expected a policy"),
        (
            {"type": "Complement", "policy": {"type": "Schedule", "policies": {"0": {"type": "Nothing"}}}},
            "expected a policy",
        ),
        ({"type": "Schedule"}, 'expected "policies"'),
        ({"type": "Schedule", "policies": {"x": {"type": "Nothing"}}}, 'expected "policies"'),
        ({"type": "Schedule", "policies": {"8": 3}}, 'a mapping with a "type"'),
        ({"type": "Schedule", "policies": {}}, "Schedule: "),
    ],
)
def test_wrong_descriptions(described: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        policy_from_dict(described)


def test_only_policies_are_described() -> None:
    with pytest.raises(PolicyError, match="expected a Policy or Schedule, got int 3"):
        policy_to_dict(3)  # type: ignore[arg-type]
