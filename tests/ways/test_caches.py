"""Kinds of KV caches: what a model answers does not depend on where its keys and values are kept."""

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, QuantizedLayer

import flexkit
from tests.patching.ways import assert_same_logits, generate
from tests.versions import quantises_to_floats
from tests.ways.questions import SIX, TOKENS, patched_model, plain_model, question, six
from tests.zoo import low_res

FULL = [name for name in SIX if name != "gemma3"]
full_attention = pytest.mark.parametrize("name", FULL)
OWN: dict[str, Callable[[Any], tf.Cache]] = {
    "dynamic": lambda config: tf.DynamicCache(config=config),
    "lazy": lambda config: tf.DynamicCache(),
    "static": lambda config: tf.StaticCache(config=config, max_cache_len=64),
    "lossless": lambda config: tf.Cache(layers=[LosslessLayer() for _ in range(config.num_hidden_layers)]),
}
QUANTISED = {
    "fp8": ("torch", {}),
    "quanto": ("optimum.quanto", {"nbits": 4, "q_group_size": 8, "residual_length": 4}),
    "hqq": ("hqq", {"nbits": 8, "q_group_size": 8, "residual_length": 4, "axis_key": 1, "axis_value": 1}),
}
"""What each backend needs, and its settings for tiny models."""


class LosslessLayer(QuantizedLayer):
    """All that a quantised cache does, but for the loss."""

    def __init__(self) -> None:
        super().__init__(residual_length=4)

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.clone()

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor


def cache_of(kind: str, model: tf.PreTrainedModel) -> tf.Cache:
    return OWN[kind](model.config.get_text_config())


@six
@pytest.mark.parametrize("kind", ["dynamic", "lazy", "static"])
def test_a_cache_of_ones_own(name: str, kind: str) -> None:
    model, asked = patched_model(name), question(name)
    answer = generate(model, asked.inputs, TOKENS, past_key_values=cache_of(kind, model))
    assert_same_logits(answer, asked.answer)


@six
@pytest.mark.parametrize("way", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_a_cache_that_generate_makes(name: str, way: dict[str, Any]) -> None:
    model, asked = patched_model(name), question(name)
    assert_same_logits(generate(model, asked.inputs, TOKENS, **way), asked.answer)


@six
def test_a_window_may_leave_the_image_behind(name: str) -> None:
    """The windows of Gemma 3 are 8 positions: while it answers, its sliding layers lose sight of the image."""
    model, asked = patched_model(name), question(name)
    dynamic, static = (generate(model, asked.inputs, 12, cache_implementation=kind) for kind in (None, "static"))
    with flexkit.trace(model) as trace:
        uncached = generate(model, asked.inputs, 12, use_cache=False)
    assert_same_logits(static, dynamic)
    assert_same_logits(uncached, dynamic)
    assert bool(trace.mask(11, 2).any())


@full_attention
@pytest.mark.parametrize("gate", [None, 0.0])
def test_a_quantised_cache_but_for_the_loss(name: str, gate: float | None) -> None:
    model, asked = patched_model(name, gate=gate), question(name)
    answer = generate(model, asked.inputs, TOKENS, past_key_values=cache_of("lossless", model))
    assert_same_logits(answer, asked.answer)


@pytest.mark.parametrize(
    ("name", "backend"),
    [*(pytest.param(name, "fp8", marks=quantises_to_floats) for name in FULL), ("llava", "quanto"), ("llava", "hqq")],
)
def test_a_quantised_cache(name: str, backend: str) -> None:
    """The prompt is answered from keys as they are; what is decoded differs from the base model's only if it reads."""
    package, settings = QUANTISED[backend]
    if importlib.util.find_spec(package.partition(".")[0]) is None or importlib.util.find_spec(package) is None:
        pytest.skip(f"{package}, which quantises with this backend, is not installed")
    asked = question(name)
    way = {"cache_implementation": "quantized", "cache_config": {"backend": backend, **settings}}
    answer = generate(patched_model(name), asked.inputs, TOKENS, **way)
    assert torch.equal(answer.logits[0], asked.answer.logits[0])
    assert not torch.equal(answer.logits[1], asked.answer.logits[1])
    base = generate(plain_model(name), low_res(asked.inputs), TOKENS, **way)
    nothing = generate(patched_model(name, policy=flexkit.Nothing()), asked.inputs, TOKENS, **way)
    assert all(torch.equal(*steps) for steps in zip(nothing.logits, base.logits, strict=True))


@quantises_to_floats
def test_no_cache_is_both_quantised_and_sliding() -> None:
    """Why Gemma 3 is not among those above."""
    with pytest.raises(ValueError, match="only full attention layers"):
        tf.QuantizedCache("fp8", plain_model("gemma3").config.get_text_config())


@pytest.mark.gpu
@six
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache(name: str, kind: str) -> None:
    model, asked = patched_model(name).cuda(), question(name)
    inputs = {key: value.cuda() for key, value in asked.inputs.items()}
    answer = generate(model, inputs, TOKENS, cache_implementation=kind, disable_compile=True)
    assert torch.equal(answer.sequences.cpu(), asked.answer.sequences)


@six
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_an_offloaded_layer_is_back_when_it_is_used(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What offloading does on a GPU, with a device that holds nothing in the place of main memory."""

    class Stream(contextlib.nullcontext[None]):
        def wait_stream(self, other: Any) -> None:
            """All has been done already."""

    def offload(layer: Any) -> None:
        layer.held = layer.keys, layer.values
        layer.keys, layer.values = (tensor.to("meta") for tensor in layer.held)

    def prefetch(layer: Any) -> None:
        if layer.is_initialized and layer.keys.is_meta:
            layer.keys, layer.values = layer.held

    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    monkeypatch.setattr(CacheLayerMixin, "offload", offload)
    monkeypatch.setattr(CacheLayerMixin, "prefetch", prefetch)
    model, asked = patched_model(name), question(name)
    for given, expected in ((low_res(asked.inputs), asked.base), (asked.inputs, asked.answer)):
        assert_same_logits(generate(model, given, TOKENS, cache_implementation=kind), expected)
