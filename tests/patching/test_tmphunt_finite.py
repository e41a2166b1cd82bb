"""Law 7: constant maps, empty selections, rows of padding, extremes of half precision: finite where the base is."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flexkit
from flexkit import Everything, Nothing, Threshold, TopK
from tests.patching.laws import EMPTY, batches, in_dtype, model_of, patched, position_ids, settings_of
from tests.zoo import FAMILIES, MAIN, Row, low_res, prompt


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def one_colour(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(value, 0.5) if "pixel" in name else value for name, value in inputs.items()}


@pytest.mark.parametrize("name", MAIN)
@settings(max_examples=50)
@given(data=st.data(), config=settings_of(), padding=st.sampled_from(["left", "right"]))
def test_constant_maps(name: str, data: st.DataObject, config: dict[str, Any], padding: str) -> None:
    model = FAMILIES[name].model()
    for layer in model.model.language_model.layers:
        for parameter in layer.self_attn.q_proj.parameters():
            parameter.data.zero_()
    inputs = one_colour(prompt(FAMILIES[name], data.draw(batches(name)), zoom=config["zoom"], padding=padding))
    base = logits(model, low_res(inputs))
    with patched(model, **config), flexkit.trace(model) as trace:
        found = logits(model, inputs)
    assert torch.isfinite(base).all()
    assert torch.isfinite(found).all()
    assert all(torch.isfinite(scores).all() for layer in trace.steps[0].layers.values() for scores in layer.scores)


@pytest.mark.parametrize("name", MAIN)
def test_a_constant_map_selects_nothing_by_threshold(name: str) -> None:
    model = FAMILIES[name].model()
    for layer in model.model.language_model.layers:
        for parameter in layer.self_attn.q_proj.parameters():
            parameter.data.zero_()
    inputs = prompt(FAMILIES[name])
    base = logits(model, low_res(inputs))
    with patched(model, zoom=2, policy=Threshold(0.0)):
        assert torch.equal(logits(model, inputs), base)
    with patched(model, zoom=2, policy=TopK(1)):
        assert not torch.equal(logits(model, inputs), base)


@pytest.mark.parametrize("name", MAIN)
@settings(max_examples=50)
@given(config=settings_of(policy=st.sampled_from([*EMPTY, Everything(), TopK(2), Threshold(0.2)])))
def test_a_row_of_padding(name: str, config: dict[str, Any]) -> None:
    model = model_of(name)
    inputs = prompt(FAMILIES[name], [Row(), Row(images=())], zoom=config["zoom"])
    inputs["position_ids"] = position_ids(model, inputs)
    inputs["attention_mask"][1] = 0
    base = logits(model, low_res(inputs))
    with patched(model, **config):
        found = logits(model, inputs)
    assert torch.isfinite(found[torch.isfinite(base)]).all()
    assert torch.equal(found[1].nan_to_num(), base[1].nan_to_num())


@pytest.mark.parametrize("name", MAIN)
def test_an_image_in_a_row_of_padding(name: str) -> None:
    model = model_of(name)
    inputs = prompt(FAMILIES[name], [Row(), Row()])
    inputs["position_ids"] = position_ids(model, inputs)
    inputs["attention_mask"][1] = 0
    queries = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    for settings_ in ({"queries": "last"}, {"queries": "all"}, {"queries": queries}):
        with patched(model, zoom=2, policy=Everything(), low_res_keys="replace", **settings_):
            assert torch.isfinite(logits(model, inputs)[0]).all()


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("policy", [Threshold(0.2), Nothing(), Everything()])
def test_without_a_querying_row(name: str, policy: flexkit.Policy) -> None:
    model = model_of(name)
    inputs = prompt(FAMILIES[name], [Row(), Row(words=2)])
    nobody = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    base = logits(model, low_res(inputs))
    for share in (True, False):
        with patched(model, zoom=2, policy=policy, share_selection=share), flexkit.trace(model):
            assert torch.equal(logits(model, inputs | {"hd_queries": nobody}), base)
            labels = torch.full_like(inputs["input_ids"], -100)
            assert torch.equal(logits(model, inputs | {"labels": labels}), base)


def sharpened(name: str, dtype: torch.dtype, scale: float) -> Any:
    """A model whose attention logits are ``scale`` times the usual."""
    model = FAMILIES[name].model()
    for layer in model.model.language_model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            part.weight.data.mul_(math.sqrt(scale))
    return model.to(dtype)


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@settings(max_examples=50)
@given(
    data=st.data(),
    config=settings_of(logit_bias=st.sampled_from([0.0, -1e4, 1e4])),
    scale=st.sampled_from([1.0, 1e3, 1e5]),
)
def test_extreme_logits(
    name: str, dtype: torch.dtype, data: st.DataObject, config: dict[str, Any], scale: float
) -> None:
    model = sharpened(name, dtype, scale)
    inputs = in_dtype(prompt(FAMILIES[name], data.draw(batches(name)), zoom=config["zoom"]), dtype)
    base = logits(model, low_res(inputs))
    with patched(model, **config):
        found = logits(model, inputs)
    assert found.dtype == base.dtype
    assert not found[torch.isfinite(base)].isnan().any()
    if torch.isfinite(base).all():
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("policy", [Nothing(), TopK(1)])
def test_overflow_of_a_tile_that_nobody_selects(policy: flexkit.Policy) -> None:
    model = FAMILIES["llava"].model().half()
    inputs = in_dtype(prompt(FAMILIES["llava"], zoom=(3, 3)), torch.float16)
    real = model.get_image_features
    with patched(model, zoom=3, policy=policy), flexkit.trace(model) as trace:
        expected = logits(model, inputs)
        read = torch.stack([layer.masks[0][0, 0] for layer in trace.steps[0].layers.values()]).any(0)
        unread = [tile for tile in range(9) if not read[3 * (tile // 3) :, 3 * (tile % 3) :][:3, :3].any()]

        def overflowing(*args: Any, **kwargs: Any) -> Any:
            output = real(*args, **kwargs)
            if len(output.pooler_output) == 9:
                for tile in unread:
                    output.pooler_output[tile].fill_(torch.inf)
            return output

        model.get_image_features = overflowing
        try:
            assert torch.equal(logits(model, inputs), expected)
        finally:
            del model.get_image_features


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_generating_in_half_precision(name: str, dtype: torch.dtype) -> None:
    model = FAMILIES[name].model().to(dtype)
    inputs = in_dtype(prompt(FAMILIES[name], [Row(), Row(words=2)]), dtype)
    with patched(model, zoom=2, policy=Threshold(0.1)):
        output = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    assert all(torch.isfinite(step).all() for step in output.logits)


@pytest.mark.parametrize("name", MAIN)
@settings(max_examples=50)
@given(data=st.data(), config=settings_of(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_gradients_are_finite(name: str, data: st.DataObject, config: dict[str, Any], dtype: torch.dtype) -> None:
    model = FAMILIES[name].model().to(dtype)
    inputs = in_dtype(prompt(FAMILIES[name], data.draw(batches(name)), zoom=config["zoom"]), dtype)
    ids = inputs["input_ids"]
    labels = torch.where((ids >= 3) & (ids < 80), ids, -100)
    with patched(model, **config):
        model(**inputs, labels=labels).loss.backward()
        assert all(parameter.grad is None or torch.isfinite(parameter.grad).all() for parameter in model.parameters())
