"""Law 1: nothing selected, or no high-res view given, and every bit is the base model's."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import StaticCache

import flexkit
from tests.patching.laws import EMPTY, batches, in_dtype, keys_values, model_of, patched, settings_of
from tests.zoo import FAMILIES, MAIN, Row, low_res, prompt

KINDS = [(torch.float64, "sdpa"), (torch.float32, "eager"), (torch.bfloat16, "sdpa"), (torch.bfloat16, "eager")]
empty = settings_of(policy=st.sampled_from(EMPTY), gate=st.sampled_from([None, 0.0, 2.0]))


def prefill(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Logits and the whole KV cache."""
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
    return [output.logits, *keys_values(output.past_key_values)]


def generation(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Tokens, logits and the KV cache of a greedy generation."""
    output = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return [output.sequences, *output.logits, *keys_values(output.past_key_values)]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=12)
@given(data=st.data(), kind=st.sampled_from(KINDS), padding=st.sampled_from(["left", "right"]), config=empty)
def test_nothing_selected(name: str, data: st.DataObject, kind: Any, padding: str, config: dict[str, Any]) -> None:
    model = model_of(name, *kind)
    rows = data.draw(batches(name))
    inputs = in_dtype(prompt(FAMILIES[name], rows, zoom=config["zoom"], padding=padding), kind[0])
    expected = prefill(model, low_res(inputs))
    with patched(model, **config):
        assert_same_bits(prefill(model, inputs), expected)


@pytest.mark.parametrize("name", MAIN)
@settings(max_examples=5)
@given(data=st.data(), kind=st.sampled_from(KINDS), config=empty, cache=st.sampled_from([None, "static"]))
def test_nothing_selected_while_generating(
    name: str, data: st.DataObject, kind: Any, config: dict[str, Any], cache: str | None
) -> None:
    model = model_of(name, *kind)
    inputs = in_dtype(prompt(FAMILIES[name], data.draw(batches(name, max_rows=2)), zoom=config["zoom"]), kind[0])
    options = {"cache_implementation": cache, "disable_compile": True}
    expected = generation(model, low_res(inputs), **options)
    with patched(model, **config):
        assert_same_bits(generation(model, inputs, **options), expected)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=8)
@given(data=st.data(), kind=st.sampled_from(KINDS), config=settings_of(gate=st.sampled_from([None, 0.0])))
def test_without_a_high_res_view(name: str, data: st.DataObject, kind: Any, config: dict[str, Any]) -> None:
    model = model_of(name, *kind)
    inputs = in_dtype(prompt(FAMILIES[name], data.draw(batches(name, max_rows=2)), zoom=config["zoom"]), kind[0])
    expected = prefill(model, low_res(inputs))
    with patched(model, **config):
        assert_same_bits(prefill(model, low_res(inputs)), expected)
        with flexkit.disabled(model):
            assert_same_bits(prefill(model, inputs), expected)


@pytest.mark.parametrize("name", MAIN)
def test_generating_without_a_high_res_view(name: str) -> None:
    model = model_of(name)
    inputs = prompt(FAMILIES[name], [Row(), Row(words=2), Row(images=())])
    expected = generation(model, low_res(inputs))
    with patched(model, zoom=2, policy=flexkit.Everything()):
        assert_same_bits(generation(model, low_res(inputs)), expected)
        with flexkit.disabled(model):
            assert_same_bits(generation(model, inputs), expected)
        assert not torch.equal(generation(model, inputs)[1], expected[1])


@pytest.mark.parametrize("name", MAIN)
def test_beams_that_select_nothing(name: str) -> None:
    model = model_of(name)
    inputs = prompt(FAMILIES[name], [Row(), Row(words=2)])
    expected = model.generate(**low_res(inputs), max_new_tokens=4, num_beams=3, do_sample=False)
    with patched(model, zoom=2, policy=flexkit.Nothing()):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False), expected)


@pytest.mark.parametrize("name", MAIN)
def test_static_cache_of_a_prefill(name: str) -> None:
    model = model_of(name)
    inputs = prompt(FAMILIES[name], [Row(), Row(words=2)])

    def prefilled(inputs: dict[str, Tensor]) -> list[Tensor]:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=40)
        return prefill(model, inputs | {"past_key_values": cache})

    expected = prefilled(low_res(inputs))
    with patched(model, zoom=2, policy=flexkit.Nothing()):
        assert_same_bits(prefilled(inputs), expected)
