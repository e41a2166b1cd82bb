"""Law 3: unpatching gives back exactly the model that came in."""

import copy
import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import flexkit
from flexkit import Everything, FlexConfig
from tests.patching.laws import model_of, patched, settings_of
from tests.zoo import FAMILIES, MAIN, Row, low_res, prompt

HOOKS = sorted(name for name in vars(nn.Module()) if "hook" in name)
CONFIG = FlexConfig(zoom=2, policy=Everything())


def fresh(name: str) -> Any:
    """A model of its own that has run once: transformers installs hooks for captured outputs in the first call."""
    model = FAMILIES[name].model()
    logits(model, low_res(prompt(FAMILIES[name])))
    return model


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything that patching could have changed and that can be compared with ``==``."""
    modules = dict(model.named_modules())
    return {
        "type": type(model),
        "attributes": {name: list(vars(module)) for name, module in modules.items()},
        "types": {name: type(module) for name, module in modules.items()},
        "configs": {name: id(module.config) for name, module in modules.items() if hasattr(module, "config")},
        "config": model.config.to_dict(),
        "hooks": {name: [dict(getattr(module, hook) or {}) for hook in HOOKS] for name, module in modules.items()},
        "implementations": [config._attn_implementation for config in (model.config, model.config.get_text_config())],
        "state": [(name, id(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()],
        "needs gradient": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in modules.items()},
        "forward": (inspect.signature(model.forward), getattr(model.forward, "__func__", model.forward)),
        "expand": model._expand_inputs_for_generation,
        "repr": repr(model),
    }


def number_of_hooks(model: nn.Module) -> dict[str, list[int]]:
    return {name: [len(registered) for registered in hooks] for name, hooks in anatomy(model)["hooks"].items()}


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=6)
@given(config=settings_of())
def test_unpatching_leaves_no_trace(name: str, config: dict[str, Any]) -> None:
    model = model_of(name)
    inputs = prompt(FAMILIES[name], [Row(), Row(words=2)], zoom=config["zoom"])
    answer = logits(model, low_res(inputs))
    before, bits = anatomy(model), copy.deepcopy(model.state_dict())
    with patched(model, **config):
        logits(model, inputs)
        assert anatomy(model) != before
        assert (anatomy(model)["state"] != before["state"]) == (config["high_res_states"] == "features")
    assert anatomy(model) == before
    assert all(torch.equal(tensor, bits[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(logits(model, low_res(inputs)), answer)


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_outputs_differ_while_patched_only(name: str, implementation: str) -> None:
    model = fresh(name)
    model.set_attn_implementation(implementation)
    inputs = prompt(FAMILIES[name])
    base = logits(model, low_res(inputs))
    for _ in range(2):  # patched, unpatched, patched again
        flexkit.patch_model(model, CONFIG, trained=True)
        assert model.config._attn_implementation == implementation
        assert not torch.equal(logits(model, inputs), base)
        assert torch.equal(logits(model, low_res(inputs)), base)
        flexkit.unpatch_model(model)
        assert model.config._attn_implementation == implementation
        assert torch.equal(logits(model, low_res(inputs)), base)


@pytest.mark.parametrize("name", MAIN)
def test_another_kernel_set_while_patched_stays(name: str) -> None:
    model = fresh(name)
    inputs = prompt(FAMILIES[name], [Row(), Row()])
    flexkit.patch_model(model, CONFIG, trained=True)
    with_sdpa = logits(model, inputs)
    model.set_attn_implementation("eager")
    # The eager softmax is float32 in every dtype.
    torch.testing.assert_close(logits(model, inputs), with_sdpa, rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits(model, inputs), with_sdpa)
    model = flexkit.unpatch_model(model)
    expected = fresh(name)
    expected.set_attn_implementation("eager")
    assert torch.equal(logits(model, low_res(inputs)), logits(expected, low_res(inputs)))


@pytest.mark.parametrize("name", MAIN)
def test_models_of_one_config_are_apart(name: str) -> None:
    config = FAMILIES[name].config()
    one, other = (FAMILIES[name].model_class(config).double().eval() for _ in range(2))
    inputs = prompt(FAMILIES[name])
    answer = logits(other, low_res(inputs))
    before = anatomy(other)
    flexkit.patch_model(one, CONFIG, trained=True)
    logits(one, inputs)
    assert anatomy(other) == before
    assert torch.equal(logits(other, low_res(inputs)), answer)
    assert not flexkit.is_patched(other)

    flexkit.patch_model(other, CONFIG, trained=True)
    flexkit.unpatch_model(one)
    assert not torch.equal(logits(other, inputs), answer)
    flexkit.unpatch_model(other)
    assert anatomy(other) == before


@pytest.mark.parametrize("name", MAIN)
def test_copies_are_apart(name: str) -> None:
    model = fresh(name)
    inputs = prompt(FAMILIES[name])
    base = logits(model, low_res(inputs))
    flexkit.patch_model(model, CONFIG, trained=True)
    answer = logits(model, inputs)
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone, inputs), answer)
    with torch.no_grad():
        for parameter in flexkit.flex_parameters(clone):
            parameter.zero_()
    assert torch.equal(logits(model, inputs), answer)
    assert not torch.equal(logits(clone, inputs), answer)

    flexkit.unpatch_model(clone)
    expected = copy.deepcopy(fresh(name))
    assert torch.equal(logits(clone, low_res(inputs)), base)
    assert anatomy(clone)["attributes"] == anatomy(expected)["attributes"]
    assert number_of_hooks(clone) == number_of_hooks(expected)
    attentions = [layer.self_attn for layer in clone.model.language_model.layers]
    assert all(attention.config is clone.model.language_model.config for attention in attentions)
    assert torch.equal(logits(model, inputs), answer)
    flexkit.unpatch_model(model)
    assert torch.equal(logits(model, low_res(inputs)), base)


def test_copy_of_a_patched_model_outlives_it() -> None:
    model = fresh("llava")
    inputs = prompt(FAMILIES["llava"])
    flexkit.patch_model(model, CONFIG, trained=True)
    answer, clone = logits(model, inputs), copy.deepcopy(model)
    original = weakref.ref(model)
    flexkit.unpatch_model(model)
    del model
    gc.collect()
    assert original() is None
    assert torch.equal(logits(clone, inputs), answer)


def test_own_hooks_and_forward_stay() -> None:
    model = fresh("llava")
    inputs = prompt(FAMILIES["llava"])
    calls: list[str] = []
    plain = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append("forward")
        return plain(*args, **kwargs)

    model.forward = counted
    model.model.language_model.register_forward_pre_hook(lambda *_: calls.append("hook"))
    before = anatomy(model)["hooks"]
    flexkit.patch_model(model, CONFIG, trained=True)
    logits(model, inputs)
    assert calls == ["forward", "hook"]
    flexkit.unpatch_model(model)
    assert model.forward is counted
    assert anatomy(model)["hooks"] == before
    logits(model, low_res(inputs))
    assert calls == ["forward", "hook"] * 2
