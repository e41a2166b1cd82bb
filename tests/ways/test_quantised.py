"""Weights in 8 or 4 bits: patched models read through float copies of them, which can be trained."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import flexkit
from flexkit.patching import added_parameters
from tests.patching.ways import generate, logits_of
from tests.ways.questions import TOKENS, in_dtype, own_model, patch, question, six
from tests.zoo import low_res


class EightBitLinear(nn.Module):
    """What libraries of quantisation have in common: integers, a scale, and no gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.weight * self.scale.to(states.dtype), self.bias)


def eight_bits(model: tf.PreTrainedModel) -> None:
    replace(model, EightBitLinear)


def torchao_8_bits(model: tf.PreTrainedModel) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: is_quantised(name, module))


def bitsandbytes_8_bits(model: tf.PreTrainedModel) -> None:
    from bitsandbytes.nn import Linear8bitLt

    replace(model, lambda linear: loaded(Linear8bitLt(*shape(linear), has_fp16_weights=False), linear))


def bitsandbytes_4_bits(model: tf.PreTrainedModel) -> None:
    from bitsandbytes.nn import Linear4bit

    replace(model, lambda linear: loaded(Linear4bit(*shape(linear), compute_dtype=torch.float32), linear))


def shape(linear: nn.Linear) -> tuple[int, int, bool]:
    return linear.in_features, linear.out_features, linear.bias is not None


def loaded(quantised: nn.Module, linear: nn.Linear) -> nn.Module:
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu")


def is_quantised(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and "language_model" in name


def replace(model: tf.PreTrainedModel, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, module in list(model.named_modules()):
        if is_quantised(name, module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))


KINDS = {
    "integers": ("torch", eight_bits),
    "torchao 8 bits": ("torchao", torchao_8_bits),
    "bitsandbytes 8 bits": ("bitsandbytes", bitsandbytes_8_bits),
    "bitsandbytes 4 bits": ("bitsandbytes", bitsandbytes_4_bits),
}


def quantised_model(name: str, kind: str) -> tf.PreTrainedModel:
    package, quantise = KINDS[kind]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    model = own_model(name).float()
    quantise(model)
    return model


@six
@pytest.mark.parametrize("kind", KINDS)
def test_patching_a_quantised_model(name: str, kind: str) -> None:
    inputs = in_dtype(question(name).inputs, torch.float32)
    model = quantised_model(name, kind)
    plain = generate(model, low_res(inputs), TOKENS)
    kinds = {key: type(module) for key, module in model.named_modules()}
    patch(model)
    added = added_parameters(model)
    assert {parameter.dtype for parameter in added.values()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in added.values())
    answer = generate(model, inputs, TOKENS)
    assert (answer.logits[0] - plain.logits[0]).abs().max() > 1e-2

    # The copies are what the integers stand for, so quantising them again changes no more than rounding does.
    attention = model.model.language_model.layers[-1].self_attn
    features = torch.randn(5, attention.k_proj.in_features)
    torch.testing.assert_close(attention.k_proj_hd(features), attention.k_proj(features), rtol=0, atol=2e-2)
    flexkit.unpatch_model(model)
    assert {key: type(module) for key, module in model.named_modules()} == kinds
    again = generate(model, low_res(inputs), TOKENS)
    assert all(torch.equal(*steps) for steps in zip(again.logits, plain.logits, strict=True))


@six
@pytest.mark.parametrize("kind", KINDS)
def test_quantising_a_patched_model(name: str, kind: str) -> None:
    """The added projections are quantised with the others: enough to answer, not to be trained."""
    asked = question(name)
    inputs = in_dtype(asked.inputs, torch.float32)
    early, late = quantised_model(name, kind), patch(own_model(name).float())
    KINDS[kind][1](late)
    ours, expected = (logits_of(model, inputs)[:, -1] for model in (late, patch(early)))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.1 * asked.distance)


@six
@pytest.mark.parametrize("kind", KINDS)
def test_training_on_a_quantised_model(name: str, kind: str) -> None:
    inputs = in_dtype(question(name).inputs, torch.float32)
    model = patch(quantised_model(name, kind))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    optimiser = torch.optim.SGD(flexkit.flex_parameters(model), lr=1e-4)
    losses: list[float] = []
    for _ in range(2):
        loss = model(**inputs, labels=labels).loss
        losses.append(float(loss))
        loss.backward()
        assert all(parameter.grad is not None for parameter in flexkit.flex_parameters(model))
        optimiser.step()
        optimiser.zero_grad()
    assert losses[1] < losses[0]


@six
def test_projections_in_more_exact_numbers_than_the_model(name: str) -> None:
    """As optimisers like them: a half-precision model with float32 projections."""
    asked, model = question(name), patch(own_model(name)).bfloat16()
    for parameter in flexkit.flex_parameters(model):
        parameter.data = parameter.data.float()
    answer = generate(model, in_dtype(asked.inputs, torch.bfloat16), TOKENS)
    assert (answer.logits[0] - asked.answer.logits[0]).abs().max() < 0.3 * asked.distance


def test_loading_quantised_weights(tmp_path: Any) -> None:
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    own_model("llava").float().save_pretrained(tmp_path)
    settings = tf.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["vision_tower", "lm_head"])
    model = tf.AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=settings)
    inputs = in_dtype(question("llava").inputs, model.dtype)
    base = generate(model, low_res(inputs), TOKENS)
    patch(model)
    assert {parameter.dtype for parameter in flexkit.flex_parameters(model)} == {model.dtype}
    assert not torch.equal(generate(model, inputs, TOKENS).logits[0], base.logits[0])
