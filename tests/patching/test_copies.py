import copy

import pytest
import torch

import flexkit
from flexkit.patching import added_parameters, get_patch
from tests.patching.ways import (
    every_family,
    families,
    generate,
    inputs_of,
    logits_of,
    new_tokens,
    patched,
    plain,
    through_a_file,
)
from tests.zoo import low_res


@every_family
def test_a_deepcopy_is_a_patched_model_of_its_own(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    twin = copy.deepcopy(model)
    before = logits_of(model, inputs)
    assert torch.equal(logits_of(twin, inputs), before)
    assert get_patch(twin) is not get_patch(model)
    assert get_patch(twin).decoder is not get_patch(model).decoder
    with torch.no_grad():
        for parameter in flexkit.flex_parameters(twin):
            parameter.zero_()
    with flexkit.trace(model) as trace:
        assert not torch.equal(logits_of(twin, inputs), before)
    assert len(trace) == 0
    assert torch.equal(logits_of(model, inputs), before)
    flexkit.unpatch_model(model)
    assert flexkit.is_patched(twin) and not torch.equal(logits_of(twin, inputs), before)
    assert torch.equal(
        generate(flexkit.unpatch_model(twin), low_res(inputs)).sequences, generate(model, low_res(inputs)).sequences
    )


@families
def test_state_through_a_file(name: str) -> None:
    model, inputs = patched(name), inputs_of(name)
    with torch.no_grad():
        for parameter in flexkit.flex_parameters(model):
            parameter.normal_()
    state = through_a_file(model.state_dict(), weights_only=True)
    other = patched(name)
    assert not torch.equal(logits_of(other, inputs), logits_of(model, inputs))
    other.load_state_dict(state, strict=True)
    assert torch.equal(logits_of(other, inputs), logits_of(model, inputs))


@families
def test_state_of_the_base_model_lacks_what_was_added(name: str) -> None:
    model, base = patched(name), plain(name)
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert missing == [key for key in model.state_dict() if key in added_parameters(model)]
    assert unexpected == []


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["published", "training_free"])
def test_the_dtype_may_change_after_patching(name: str, dtype: torch.dtype, preset: str) -> None:
    settings = {"start_layer": 1, "zoom": 2, "policy": flexkit.TopK(3), "gate": None, "high_res_states": "features"}
    config = getattr(flexkit.FlexConfig, preset)(**settings)
    late, early = patched(name, config).to(dtype), plain(name).to(dtype)
    flexkit.patch_model(early, config, trained=True)
    assert {parameter.dtype for parameter in flexkit.flex_parameters(late)} == {dtype}
    inputs = inputs_of(name)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    ours = logits_of(late, inputs)
    assert ours.dtype == dtype
    assert torch.equal(ours, logits_of(early, inputs))
    assert bool(ours[:2, -1].isfinite().all())
    assert not torch.equal(ours[:2, -1], logits_of(late, low_res(inputs))[:2, -1])
    assert new_tokens(generate(late, inputs, 3)).shape == (3, 3)


@families
def test_half_and_back(name: str) -> None:
    model, inputs = patched(name).half().float(), inputs_of(name)
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    assert bool(logits_of(model, inputs)[:2, -1].isfinite().all())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_two_models_of_one_config() -> None:
    ours, other = patched("llava"), plain("llava")
    other.config = ours.config
    assert not flexkit.is_patched(other)
    inputs = inputs_of("llava")
    assert torch.equal(logits_of(other, low_res(inputs)), logits_of(ours, low_res(inputs)))
