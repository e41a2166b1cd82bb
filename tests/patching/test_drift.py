"""Features that layers cannot be expected to understand are told, by what a model's own states look like."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

import flexkit
from flexkit.visual_search import load_model
from flexkit.visual_search.evaluation import Batch
from tests.patching.ways import inputs_of, plain
from tests.zoo import IMAGE, low_res

FEATURES = flexkit.FlexConfig(zoom=2, select_from="same", start_layer=1, policy=flexkit.TopK(3))
families = pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])


def drifting(name: str, by: float) -> Any:
    """A model whose first layers add a lot to what they are given, or hardly anything."""
    model = plain(name)
    for layer in model.model.language_model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data.mul_(by)
        for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
            if name == "gemma3":
                getattr(layer, norm).weight.data.fill_(by - 1)  # it multiplies by 1 + weight
    return model


def warned(model: Any, inputs: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found, torch.no_grad():
        warnings.simplefilter("always")
        model(**inputs)
    return [str(each.message) for each in found if issubclass(each.category, flexkit.FeatureDriftWarning)]


@families
def test_what_is_told_is_what_is_measured(name: str) -> None:
    inputs = inputs_of(name)
    model = drifting(name, 1e3)
    with torch.no_grad():
        states = model(**low_res(inputs), output_hidden_states=True).hidden_states
    images = inputs["input_ids"] == IMAGE
    cosine = cosine_similarity(states[0][images], states[2][images], dim=-1).mean().item()
    assert cosine < 0.3
    flexkit.patch_model(model, FEATURES)
    assert not warned(model, low_res(inputs))
    (message,) = warned(model, inputs)
    assert f"cosine of {cosine:.2f}" in message
    assert not warned(model, inputs)  # once


@families
def test_states_that_stay_are_not_told(name: str) -> None:
    assert not warned(flexkit.patch_model(drifting(name, 1e-3), FEATURES), inputs_of(name))


def trained(model: Any) -> Any:
    with torch.no_grad():
        for parameter in flexkit.flex_parameters(model):
            parameter.add_(0.1)
    return model


UNTOLD: dict[str, Callable[[Any], Any]] = {
    "trained": trained,
    "in training": lambda model: model.train(),
    "unpatched and own": lambda model: flexkit.patch_model(
        flexkit.unpatch_model(model), FEATURES.replace(high_res_states="own")
    ),
}


@pytest.mark.parametrize("change", UNTOLD)
def test_who_need_not_be_told(change: str) -> None:
    model = UNTOLD[change](flexkit.patch_model(drifting("llava", 1e3), FEATURES))
    assert not warned(model, inputs_of("llava"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_measures_for_itself(copied: Callable[[Any], Any]) -> None:
    model = flexkit.patch_model(drifting("llava", 1e3), FEATURES)
    other = copied(model)
    assert warned(model, inputs_of("llava")) and warned(other, inputs_of("llava"))


def test_the_small_model_reads_its_features() -> None:
    """Which it does, with projections that nobody trained."""
    model, processor = load_model("base")
    flexkit.patch_model(model, flexkit.FlexConfig.training_free(high_res_states="features"))
    inputs = Batch.draw("attribute", 7, range(4)).inputs(flexkit.FlexProcessor(processor, model))
    assert not warned(model, inputs)
