"""Policies of the user's own: functions and subclasses, right and wrong."""

import re
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from flexkit.errors import ConfigError, PolicyError
from flexkit.selection import AttentionMapSelector, FunctionPolicy, Policy, TopK, as_policy


def positive(scores: Tensor) -> Tensor:
    return scores > 0


class Above:
    def __call__(self, scores: Tensor) -> Tensor:
        return scores > 1


def test_a_function_is_a_policy() -> None:
    policy = as_policy(positive)
    scores = torch.tensor([[-1.0, 1.0]])
    assert repr(policy) == "FunctionPolicy(positive)"
    assert policy(scores).tolist() == [[False, True]]
    assert policy.select(scores, (1, 3)).tolist() == [[False, False, True]]
    assert policy == as_policy(positive) and policy.uses_scores


def test_names_of_callables() -> None:
    assert repr(as_policy(Above())) == "FunctionPolicy(Above)"
    assert repr(as_policy(partial(positive))) == "FunctionPolicy(partial)"


def test_a_policy_stays_itself() -> None:
    policy = TopK(3)
    assert as_policy(policy) is policy


@pytest.mark.parametrize("wrong", [3, "TopK", None, {8: TopK(1)}])
def test_what_is_no_policy(wrong: object) -> None:
    with pytest.raises(PolicyError, match="expected a policy: pass a flexkit policy"):
        as_policy(wrong)


def test_a_class_is_no_policy() -> None:
    with pytest.raises(PolicyError, match=r"class TopK, .*pass TopK\(\.\.\.\)"):
        as_policy(TopK)


@dataclass(frozen=True)
class Returns(Policy):
    result: object

    def mask(self, scores: Tensor) -> Tensor:
        return self.result  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (None, "returned NoneType"),
        ([[True]], "returned list"),
        (torch.ones(2, 3), r"returned a torch\.float32 tensor of shape \(2, 3\) on cpu"),
        (torch.ones(2, 3, dtype=torch.uint8), r"torch\.uint8"),
        (torch.ones(3, 2, dtype=torch.bool), r"shape \(3, 2\)"),
        (torch.ones(1, 2, 3, dtype=torch.bool), r"shape \(1, 2, 3\)"),
        (torch.ones(2, 3, dtype=torch.bool, device="meta"), "on meta"),
    ],
)
def test_a_wrong_mask_is_named(result: object, got: str) -> None:
    scores = torch.rand(2, 3)
    for call in (lambda p: p(scores), lambda p: p.select(scores, (4, 6)), lambda p: (~p)(scores)):
        with pytest.raises(PolicyError, match=got) as caught:
            call(Returns(result))
        assert "Returns(" in str(caught.value)
        assert "expected a torch.bool tensor of shape (2, 3) on cpu" in str(caught.value)


def test_a_wrong_function_is_named() -> None:
    with pytest.raises(PolicyError, match=r"FunctionPolicy.*lambda.*returned a torch.float32"):
        AttentionMapSelector(lambda scores: scores).select(torch.rand(1, 1, 2, 2), 2)


def test_a_wrong_select_is_caught_by_the_selector() -> None:
    class Careless(Policy):
        def mask(self, scores: Tensor) -> Tensor:
            return scores > 0

        def select(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
            return self(scores)

    with pytest.raises(PolicyError, match=r"expected a torch\.bool tensor of shape \(1, 1, 4, 4\)"):
        AttentionMapSelector(Careless()).select(torch.rand(1, 1, 2, 2), 2)


def divided(scores: Tensor) -> Tensor:
    raise ZeroDivisionError("of my own")


FAILING = {
    "broadcast": (lambda scores: scores > torch.zeros(9, 7), "RuntimeError: The size of tensor a"),
    "no maps": (lambda scores: scores > scores.max(), "RuntimeError: max"),
    "index": (lambda scores: scores[7] > 0, "IndexError: "),
    "attribute": (lambda scores: scores.above(1), "AttributeError: "),
    "raises": (divided, "ZeroDivisionError: of my own"),
}


@pytest.mark.parametrize("kind", FAILING)
@pytest.mark.parametrize("shape", [(1, 0, 3, 2), (0, 1, 5), (2, 0, 5, 1)], ids=str)
def test_a_policy_that_fails_is_named_with_the_shape(kind: str, shape: tuple[int, ...]) -> None:
    function, failure = FAILING[kind]
    policy, scores = as_policy(function), torch.rand(shape)
    asked = (policy, ~policy, policy & TopK(1), TopK(1) | policy, policy.pooled(2), policy.dilated(1))
    for each in asked:
        for call in (each, lambda scores, each=each: each.select(scores, (6, 6))):
            with pytest.raises(PolicyError, match=re.escape(f"on scores of shape {shape} with {failure}")) as caught:
                call(scores)
            assert str(caught.value).startswith("FunctionPolicy(") and caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("shape", "failure"),
    [
        ((1, 0, 3, 3), r"failed on scores of shape \(1, 0, 3, 3\) with RuntimeError: The size of tensor a"),
        ((1, 2, 3, 3), r"failed on scores of shape \(1, 2, 3, 3\) with RuntimeError: The size of tensor a"),
        ((0, 1, 5), r"returned a torch.bool tensor of shape \(0, 0, 5\)"),
    ],
    ids=str,
)
def test_a_mean_that_forgets_its_axis(shape: tuple[int, ...], failure: str) -> None:
    with pytest.raises(PolicyError, match=failure):
        as_policy(lambda scores: scores > scores.mean(-1))(torch.rand(shape))


def test_a_select_that_fails_is_named_too() -> None:
    class Careless(Policy):
        def mask(self, scores: Tensor) -> Tensor:
            return scores > 0

        def select(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
            return self(scores).view(size)

    with pytest.raises(PolicyError, match=r"Careless.* failed on scores of shape \(1, 1, 2, 2\) with RuntimeError"):
        AttentionMapSelector(Careless()).select(torch.rand(1, 1, 2, 2), 2)


def test_errors_that_say_enough_stay_as_they_are() -> None:
    for error in (ConfigError("of my own"), torch.OutOfMemoryError("of the device")):

        def fail(scores: Tensor, error: Exception = error) -> Tensor:
            raise error

        with pytest.raises(type(error), match=str(error)):
            as_policy(fail).dilated(1)(torch.rand(2, 2))


@pytest.mark.parametrize(
    "scores",
    [[[1.0]], torch.ones(4), torch.ones(2, 2, dtype=torch.long), torch.ones(2, 0, 3), torch.ones(2, 3, 0)],
)
def test_wrong_scores(scores: object) -> None:
    with pytest.raises(PolicyError, match=r"TopK\(k=1\) was given .*expected floating scores"):
        TopK(1)(scores)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [4, (4,), (4, 0), (4, 2.0), (2, 2, 2)])
def test_wrong_sizes(size: object) -> None:
    for policy in (TopK(1), TopK(1).pooled(2)):
        with pytest.raises(ConfigError, match="size must be two positive ints"):
            policy.select(torch.rand(2, 2), size)  # type: ignore[arg-type]


def test_a_policy_must_say_its_mask() -> None:
    with pytest.raises(TypeError, match="mask"):
        Policy()  # type: ignore[abstract]


def test_half_precision_scores_arrive_as_float32() -> None:
    seen = []

    def note(scores: Tensor) -> Tensor:
        seen.append(scores.dtype)
        return scores > 0

    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        FunctionPolicy(note)(torch.zeros(1, 1, dtype=dtype))
    assert seen == [torch.float32, torch.float32, torch.float32, torch.float64]
