"""Where weights are kept, and in which numbers."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as tf
from torch import nn

import flexkit
from tests.patching.ways import assert_same_logits, generate
from tests.ways.questions import TOKENS, in_dtype, own_model, patch, question, six
from tests.zoo import low_res

CPU = torch.device("cpu")
PLACES: dict[str, Callable[[Any, Path], Any]] = {
    "cpu offload": lambda model, folder: accelerate.cpu_offload(decoder_layers(model), CPU),
    "disk offload": lambda model, folder: accelerate.disk_offload(decoder_layers(model), folder, CPU),
    "device map": lambda model, folder: accelerate.dispatch_model(
        model, dict(device_map(model, decoder_layers(model)[2:])), "cpu", offload_dir=folder, force_hooks=True
    ),
}


def decoder_layers(model: tf.PreTrainedModel) -> Any:
    return model.model.language_model.layers


def device_map(
    module: nn.Module | nn.Parameter, away: Iterable[nn.Module], name: str = ""
) -> Iterator[tuple[str, str]]:
    """The largest parts of a model that lie in one place, and where."""
    if any(module is part for part in away):
        yield name, "disk"
    elif not isinstance(module, nn.Module) or set(module.modules()).isdisjoint(away):
        yield name, "cpu"
    else:
        parts = (*module.named_children(), *module.named_parameters(recurse=False))
        for child, part in parts:
            yield from device_map(part, away, f"{name}.{child}".lstrip("."))


def offloaded(model: tf.PreTrainedModel) -> list[str]:
    return sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")
@six
@pytest.mark.parametrize("way", PLACES)
def test_placed_before_patching(name: str, way: str, tmp_path: Path) -> None:
    """The hooks that fetch weights go on fetching, while the model is patched and after."""
    asked, model = question(name), own_model(name)
    PLACES[way](model, tmp_path)
    away = offloaded(model)
    assert away
    hooks = {key: id(module._hf_hook) for key, module in model.named_modules() if hasattr(module, "_hf_hook")}
    patch(model)
    assert_same_logits(generate(model, asked.inputs, TOKENS), asked.answer)
    flexkit.unpatch_model(model)
    assert offloaded(model) == away
    assert {key: id(module._hf_hook) for key, module in model.named_modules() if hasattr(module, "_hf_hook")} == hooks
    assert_same_logits(generate(model, low_res(asked.inputs), TOKENS), asked.base)


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")
@six
@pytest.mark.parametrize("way", PLACES)
def test_placed_after_patching(name: str, way: str, tmp_path: Path) -> None:
    """The added projections are weights as all others."""
    asked, model = question(name), patch(own_model(name))
    PLACES[way](model, tmp_path)
    assert any("k_proj_hd" in key for key in offloaded(model))
    assert_same_logits(generate(model, asked.inputs, TOKENS), asked.answer)


@six
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Finite, and nearer to the exact answer than the base model's answer is."""
    asked = question(name)
    for model in (patch(own_model(name)).to(dtype), patch(own_model(name).to(dtype))):
        answer = generate(model, in_dtype(asked.inputs, dtype), TOKENS)
        assert all(bool(step.isfinite().all()) for step in answer.logits)
        assert (answer.logits[0] - asked.answer.logits[0]).abs().max() < 0.3 * asked.distance
    assert {parameter.dtype for parameter in flexkit.flex_parameters(model)} == {dtype}
