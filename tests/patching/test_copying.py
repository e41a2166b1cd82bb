"""However a patched model is copied, the copy is a patched model of its own, or one error says that it is none."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

import flexkit
from flexkit.patching import added_parameters, get_patch
from tests.patching.ways import SETTINGS, generate, inputs_of, logits_of, new_tokens, patched, plain, through_a_file
from tests.zoo import VOCABULARY, ZOO, Row, low_res, prompt
from tests.zoo.exact import compute_exactly

saved = partial(through_a_file, weights_only=False)


def in_pure_python(model: Any) -> Any:
    file = io.BytesIO()
    pickle._Pickler(file).dump(model)  # type: ignore[attr-defined]
    return pickle._loads(file.getvalue())  # type: ignore[attr-defined]


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
    **{f"pickle {protocol}": lambda model, p=protocol: pickle.loads(pickle.dumps(model, p)) for protocol in (0, 2, 5)},
    "pickle in Python": in_pure_python,
    "averaged": lambda model: AveragedModel(model).module,
    "twice": lambda model: saved(copy.deepcopy(model)),
}
ways = pytest.mark.parametrize("way", COPIES)


def same_bits(one: Any, other: Any) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def assert_apart(model: Any, twin: Any, inputs: dict[str, Tensor]) -> None:
    """What is done to one of two patched models does nothing to the other."""
    before = logits_of(model, inputs)
    assert same_bits(model, twin) and torch.equal(logits_of(twin, inputs), before)
    assert get_patch(twin) is not get_patch(model)
    assert {id(module) for module in model.modules()}.isdisjoint(map(id, twin.modules()))
    with torch.no_grad():
        for parameter in flexkit.flex_parameters(twin):
            parameter.zero_()
    with flexkit.trace(model) as trace, flexkit.disabled(twin):
        base = logits_of(twin, inputs)
    assert len(trace) == 0
    assert torch.equal(base, logits_of(model, low_res(inputs)))
    assert torch.equal(logits_of(model, inputs), before)
    flexkit.unpatch_model(model)
    assert flexkit.is_patched(twin) and not flexkit.is_patched(model)
    assert torch.equal(logits_of(flexkit.unpatch_model(twin), low_res(inputs)), base)
    assert same_bits(model, twin)


@ways
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_copy_is_a_patched_model_of_its_own(name: str, way: str) -> None:
    model, inputs = patched(name), inputs_of(name, (Row(),))
    assert_apart(model, COPIES[way](model), inputs)


@pytest.mark.parametrize("name", ZOO)
def test_every_family_goes_through_a_file(name: str) -> None:
    base = ZOO[name].model()
    try:
        saved(base)
    except (AttributeError, pickle.PicklingError):
        pytest.skip("the base model does not: it is made up with functions of the tests")
    model = flexkit.patch_model(base, flexkit.FlexConfig(zoom=2, policy=flexkit.TopK(2)), trained=True)
    twin = saved(model)
    inputs = prompt(ZOO[name], zoom=(2, 2))
    assert same_bits(model, twin)
    assert torch.equal(logits_of(twin, inputs), logits_of(model, inputs))
    flexkit.unpatch_model(model)
    assert torch.equal(logits_of(flexkit.unpatch_model(twin), low_res(inputs)), logits_of(model, low_res(inputs)))


def test_a_copy_generates_by_itself() -> None:
    model, inputs = patched("llava"), inputs_of("llava", (Row(),))
    twin = saved(model)
    expected = new_tokens(generate(model, inputs))
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(new_tokens(generate(twin, inputs)), expected)


def test_open_blocks_stay_with_the_original() -> None:
    model, inputs = patched("llava"), inputs_of("llava", (Row(),))
    with flexkit.trace(model) as trace, flexkit.disabled(model):
        twins = [COPIES[way](model) for way in ("deepcopy", "torch.save")]
        for twin in twins:
            logits_of(twin, inputs)
    answer = logits_of(model, inputs)
    for twin in twins:
        assert torch.equal(logits_of(twin, inputs), answer)
    assert len(trace) == 0


def test_a_shallow_copy_says_that_it_is_one() -> None:
    model, inputs = patched("llava"), inputs_of("llava", (Row(),))
    twin = copy.copy(model)
    message = r"shallow copy of a patched LlavaForConditionalGeneration.*copy\.deepcopy.*DistributedDataParallel"
    for use in (
        lambda: twin(**inputs),
        lambda: twin.generate(**inputs),
        lambda: twin.save_pretrained("nowhere"),
        lambda: copy.copy(twin),
        lambda: torch.save(twin, io.BytesIO()),
    ):
        with pytest.raises(flexkit.PatchError, match=message):
            use()
    with pytest.raises(flexkit.PatchError, match="shallow copy"):
        flexkit.unpatch_model(twin)
    flexkit.unpatch_model(model)
    assert torch.equal(logits_of(model, low_res(inputs)), logits_of(plain("llava"), low_res(inputs)))


def test_replicas_of_data_parallel_are_refused() -> None:
    with pytest.raises(flexkit.PatchError, match="DistributedDataParallel"):
        patched("llava")._replicate_for_data_parallel()


def test_weights_for_a_call() -> None:
    """``functional_call`` swaps weights in the model itself: the patch reads those that are given."""
    model, inputs = patched("llava"), inputs_of("llava", (Row(),))
    answer = logits_of(model, inputs)
    zeros = {name: torch.zeros_like(weight) for name, weight in added_parameters(model).items()}
    with torch.no_grad():
        swapped = torch.func.functional_call(model, zeros, kwargs=inputs).logits
    assert not torch.equal(swapped, answer)
    assert torch.equal(logits_of(model, inputs), answer)


def _answer(rank: int, model: Any, inputs: dict[str, Tensor], answer: Tensor) -> None:
    torch.set_num_threads(1)
    compute_exactly(model)
    answer.copy_(logits_of(model, inputs))


def test_a_worker_that_is_spawned() -> None:
    # Others do not run in a new process, patched or not, until it has built a model of their class.
    model, inputs = patched("qwen2_5_vl").share_memory(), inputs_of("qwen2_5_vl", (Row(),))
    answer = torch.zeros(*inputs["input_ids"].shape, VOCABULARY, dtype=torch.float64).share_memory_()
    torch.multiprocessing.spawn(_answer, (model, inputs, answer), nprocs=1)
    torch.testing.assert_close(answer, logits_of(model, inputs))


def test_a_policy_of_a_module_goes_along() -> None:
    model = flexkit.patch_model(plain("llava"), flexkit.FlexConfig(**SETTINGS | {"policy": above_mean}), trained=True)
    inputs = inputs_of("llava", (Row(),))
    assert_apart(model, saved(model), inputs)


def above_mean(scores: Tensor) -> Tensor:
    return scores >= scores.mean((-2, -1), keepdim=True)
