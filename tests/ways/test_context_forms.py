"""Forms of models whose attention reads the image from a context: offloaded, in other numbers."""

from typing import Any

import accelerate
import pytest
import torch
from torch import nn

import flexkit
from flexkit.patching import added_parameters
from tests.patching.ways import assert_close, assert_same_logits, logits_of
from tests.versions import counts_patches_exactly, marked
from tests.ways.contexts import BLOCKS, each, question, said
from tests.ways.questions import in_dtype, own_model, patch, patched_model
from tests.ways.test_quantised import EightBitLinear
from tests.zoo import low_res


def part(model: Any, name: str) -> nn.Module:
    return model.get_submodule(BLOCKS[name])


def offloaded(model: nn.Module) -> set[str]:
    return {key for key, parameter in model.named_parameters() if parameter.is_meta}


@pytest.mark.parametrize("name", ["mllama", "git", "blip", "vision-encoder-decoder", "blip-2", "kosmos-2"])
@pytest.mark.parametrize("late", [False, True])
def test_offloaded_before_and_after_patching(name: str, late: bool) -> None:
    asked, model = question(name), own_model(name)
    if late:
        patch(model)
    accelerate.cpu_offload(part(model, name), torch.device("cpu"))
    away = offloaded(model)
    assert away and late == any("_hd" in key for key in away)
    if not late:
        patch(model)
    assert_same_logits(said(model, asked.inputs), asked.answer)
    flexkit.unpatch_model(model)
    assert offloaded(model) == {key for key in away if "_hd" not in key}
    assert_same_logits(said(model, low_res(asked.inputs)), asked.base)


@pytest.mark.parametrize("name", marked(BLOCKS, aria=counts_patches_exactly, idefics2=counts_patches_exactly))
def test_half_precision(name: str) -> None:
    """One type or the other."""
    asked, dtype = question(name), torch.float16 if list(BLOCKS).index(name) % 2 else torch.bfloat16
    model = patch(own_model(name).to(dtype))
    answer = said(model, in_dtype(asked.inputs, dtype))
    assert all(bool(step.isfinite().all()) for step in answer.logits)
    assert (answer.logits[0] - asked.answer.logits[0]).abs().max() < 0.3 * asked.distance
    assert {parameter.dtype for parameter in flexkit.flex_parameters(model)} == {dtype}


@pytest.mark.parametrize("name", ["mllama", "git", "florence2", "vision-encoder-decoder-gpt2", "blip-2", "kosmos-2"])
def test_eight_bit_weights(name: str) -> None:
    """What is added to a quantised part is float, and trained; it stands for the integers."""
    inputs, model = in_dtype(question(name).inputs, torch.float32), own_model(name).float()
    for module in list(part(model, name).modules()):
        for key, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, key, EightBitLinear(child))
    plain = logits_of(model, low_res(inputs))
    patch(model)
    added = added_parameters(model)
    assert added and {parameter.dtype for parameter in added.values()} == {torch.float32}
    assert (logits_of(model, inputs) - plain).abs().max() > 1e-2
    model(**inputs).logits.pow(2).mean().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in added.values())
    assert any(bool(parameter.grad.any()) for parameter in added.values())


@each
def test_attentions_hidden_states_and_tuples(name: str) -> None:
    """All that is returned is the base model's in form."""
    model, inputs = own_model(name), question(name).inputs
    model.set_attn_implementation("eager")
    wanted: dict[str, Any] = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        base, ours = model(**low_res(inputs), **wanted), patch(model)(**inputs, **wanted)
        row = model(**inputs, return_dict=False)
    assert ours.keys() == base.keys()
    for key in [key for key in base if key.endswith(("attentions", "hidden_states")) and base[key] is not None]:
        pairs = list(zip(ours[key], base[key], strict=True))
        assert all(mine is theirs is None or mine.shape == theirs.shape for mine, theirs in pairs)
    assert_close(ours.logits.float(), logits_of(patched_model(name), inputs).float())
    assert any(each is not None and torch.equal(each, ours.logits) for each in row if isinstance(each, torch.Tensor))


@pytest.mark.parametrize("name", ["mllama", "git", "aria", "idefics2"])
def test_embeddings(name: str) -> None:
    """In the place of ids; tiles are shown with others, since GIT writes into those that it is given."""
    model, inputs = patched_model(name), question(name).inputs
    given = {key: value for key, value in inputs.items() if key != "input_ids"}
    with torch.no_grad():
        given["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    assert_close(logits_of(model, given), logits_of(model, inputs))
