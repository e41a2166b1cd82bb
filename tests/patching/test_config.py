import json
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flexkit
from flexkit import Border, Everything, FlexConfig, Nothing, Schedule, Threshold, TopK, TopP
from flexkit.errors import ConfigError, PolicyError
from flexkit.patching import get_patch
from tests.patching.ways import families, inputs_of, logits_of, patched, plain
from tests.zoo import FAMILIES, TEXT, ZOO

POLICIES = [
    Threshold(48 / 255),
    Threshold(0.1).pooled(9),
    TopK(4) | Threshold(0.5),
    TopP(0.9).dilated(1) & ~Border(1),
    Schedule({2: TopK(3), 5: Nothing()}),
    Everything(),
]
SETTINGS = {
    "start_layer": st.none() | st.integers(0, 80),
    "zoom": st.none() | st.integers(1, 5) | st.tuples(st.integers(1, 5), st.integers(1, 5)),
    "policy": st.none() | st.sampled_from(POLICIES),
    "queries": st.sampled_from(["last", "all"]),
    "select_from": st.sampled_from(["previous", "same"]),
    "low_res_keys": st.sampled_from(["keep", "replace"]),
    "replace_dilation": st.integers(0, 4),
    "logit_bias": st.floats(-10, 10),
    "key_norm": st.booleans(),
    "gate": st.none() | st.floats(0, 5),
    "positions": st.sampled_from(["interpolated", "fractional"]),
    "share_selection": st.none() | st.booleans(),
    "reduce": st.sampled_from(["sum", "mean", "max"]),
    "heads": st.none() | st.lists(st.integers(0, 31), min_size=1, unique=True),
    "budget": st.none() | st.integers(1, 999) | st.floats(0.01, 1.0),
    "alpha": st.floats(0, 1),
}


@given(st.fixed_dictionaries({}, optional=SETTINGS))
def test_round_trip_through_json(settings: dict[str, Any]) -> None:
    config = FlexConfig(**settings)
    again = FlexConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.policy == config.policy
    assert again.shares_selection == config.shares_selection
    for name in settings.keys() - {"zoom", "heads"}:
        assert getattr(again, name) == getattr(config, name)
    if config.zoom is not None:
        assert again.zoom_pair == config.zoom_pair


@given(st.sets(st.text(min_size=1).filter(lambda name: name not in SETTINGS), min_size=1, max_size=3))
def test_unknown_keys(names: set[str]) -> None:
    with pytest.raises(ConfigError, match="unknown settings"):
        FlexConfig.from_dict(FlexConfig().to_dict() | dict.fromkeys(names))


def bright(scores: Tensor) -> Tensor:
    return scores > scores.mean((-2, -1), keepdim=True)


def test_a_policy_of_ones_own_must_be_given_again() -> None:
    plain_values = FlexConfig(policy=bright, zoom=2).to_dict()
    assert plain_values["policy"] == {"type": "custom", "name": "bright"}
    with pytest.raises(PolicyError, match="bright"):
        FlexConfig.from_dict(plain_values)
    again = FlexConfig.from_dict(plain_values, policy=bright)
    assert again.policy == FlexConfig(policy=bright).policy
    assert again.zoom_pair == (2, 2)


def test_queries_of_one_batch_are_not_saved() -> None:
    with pytest.raises(ConfigError, match="one batch"):
        FlexConfig(queries=torch.ones(1, 4, dtype=torch.bool)).to_dict()


def test_what_a_patched_model_resolved_can_be_saved() -> None:
    config = get_patch(flexkit.patch_model(plain("llava"), trained=True)).config
    again = FlexConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    inputs = inputs_of("llava", zoom=(3, 3))
    assert torch.equal(logits_of(patched("llava", config), inputs), logits_of(patched("llava", again), inputs))


WRONG = {
    "start_layer": [True, 1.0, "1"],
    "zoom": [0, -1, (1,), (1, 2, 3, 4), (0, 1), (1.0, 2), "ab", True, 2.5],
    "policy": [3, "x", TopK],
    "queries": ["first", None, [1]],
    "select_from": ["next", None, ["same"]],
    "low_res_keys": ["drop", None],
    "replace_dilation": [-1, 1.5, True, None],
    "logit_bias": ["a", None, float("nan"), float("inf"), True],
    "key_norm": ["yes", None, 1],
    "gate": [-1, "a", float("nan"), True],
    "positions": ["absolute", None],
    "share_selection": ["a", 1],
    "reduce": ["min", None],
    "heads": [2, {1}],
    "alpha": [2, -0.1, float("nan"), None, "a", True],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in WRONG for value in WRONG[field]], ids=repr)
def test_settings_out_of_range(field: str, value: object) -> None:
    with pytest.raises(flexkit.FlexkitError):
        FlexConfig(**{field: value})
    with pytest.raises(flexkit.FlexkitError):
        FlexConfig().replace(**{field: value})


WRONG_FOR_SELECTOR = {"heads": [[], [0, 0], [-1], "ab"], "budget": [0, -0.5, 1.5, True, "a"]}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in WRONG_FOR_SELECTOR for value in WRONG_FOR_SELECTOR[field]],
    ids=repr,
)
def test_settings_that_no_selector_takes(field: str, value: object) -> None:
    model = plain("llava")
    with pytest.raises(ConfigError, match=field):
        flexkit.patch_model(model, FlexConfig(**{field: value}))
    assert not flexkit.is_patched(model)
    assert not any("hd" in name for name in model.state_dict())


START_OUT_OF_RANGE = [
    (-1, {}),
    (4, {}),
    (99, {"select_from": "same"}),
    (0, {"policy": TopK(2)}),
    (0, {"policy": Everything(), "budget": 4}),
    (-1, {"policy": Everything()}),
]


@pytest.mark.parametrize(("start_layer", "settings"), START_OUT_OF_RANGE)
def test_start_layer_out_of_range(start_layer: int, settings: dict[str, Any]) -> None:
    model = plain("llava")
    with pytest.raises(ConfigError, match=r"start_layer must be an int from [01] to 3"):
        flexkit.patch_model(model, FlexConfig(start_layer=start_layer, **settings))
    assert not flexkit.is_patched(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


@families
@pytest.mark.parametrize("settings", [{"policy": Everything()}, {"select_from": "same"}], ids=str)
def test_layer_zero_needs_no_map_of_an_earlier_one(name: str, settings: dict[str, Any]) -> None:
    model, inputs = patched(name, start_layer=0, **settings), inputs_of(name)
    assert bool(logits_of(model, inputs).isfinite().all())
    assert sorted(get_patch(model).layers) == [0, 1, 2, 3]


@pytest.mark.parametrize(("layers", "start"), [(1, None), (2, 1), (4, 1), (12, 3), (24, 7), (32, 9), (40, 11)])
def test_default_start_is_the_papers_quarter(layers: int, start: int | None) -> None:
    config = FAMILIES["llava"].config()
    config.text_config.num_hidden_layers = layers
    with torch.device("meta"):
        model = tf.LlavaForConditionalGeneration(config)
    if start is None:
        with pytest.raises(ConfigError, match="start_layer"):
            flexkit.patch_model(model)
        return
    assert get_patch(flexkit.patch_model(model, trained=True)).config.start_layer == start


KINDS = {
    "full first": (["full_attention", "sliding_attention"] * 2, 1),
    "sliding first": (["sliding_attention", "full_attention"] * 2, 2),
    "one in six": ((["sliding_attention"] * 5 + ["full_attention"]) * 2, 6),
    "full late": (["sliding_attention"] * 7 + ["full_attention"], 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_default_start_follows_a_layer_that_sees_the_whole_image(kind: str) -> None:
    layer_types, start = KINDS[kind]
    config = FAMILIES["gemma3"].config()
    text = TEXT | {"num_hidden_layers": len(layer_types)}
    config.text_config = tf.Gemma3TextConfig(**text, layer_types=layer_types, sliding_window=8)
    with torch.device("meta"):
        model = tf.Gemma3ForConditionalGeneration(config)
    found = get_patch(flexkit.patch_model(model, trained=True)).config.start_layer
    assert found == start
    if kind != "full late":  # where no reading layer could follow it, the quarter it is
        assert layer_types[found - 1] == "full_attention"


@families
def test_defaults_that_follow_the_model(name: str) -> None:
    config = get_patch(flexkit.patch_model(plain(name), trained=True)).config
    assert config.zoom_pair == ((2, 2) if FAMILIES[name].any_grid else (3, 3))
    assert config.policy == (
        Threshold(48 / 255).dilated(1) if FAMILIES[name].any_grid else Threshold(48 / 255).pooled(9)
    )


def test_presets_and_their_warning() -> None:
    published, training_free = FlexConfig.published(zoom=2), FlexConfig.training_free(zoom=2)
    features = FlexConfig.training_free(high_res_states="features", gate=None, zoom=2)
    assert (published.select_from, published.low_res_keys, published.key_norm) == ("previous", "keep", False)
    assert (features.select_from, features.low_res_keys, features.key_norm) == ("same", "replace", True)
    assert (training_free.select_layers, training_free.low_res_keys, training_free.surer) == ("all", "replace", 1.0)
    assert (published.gate, features.gate, training_free.gate) == (None, None, 0.05)
    assert published.zoom_pair == training_free.zoom_pair == (2, 2)
    with pytest.warns(flexkit.UntrainedProjectionsWarning, match="training_free"):
        flexkit.patch_model(plain("llava"), published)
    with pytest.raises(ConfigError, match="zoom"):
        _ = FlexConfig().zoom_pair


@pytest.mark.filterwarnings("error::flexkit.UntrainedProjectionsWarning")
def test_no_warning_where_nothing_needs_training() -> None:
    model = flexkit.patch_model(plain("llava"), FlexConfig.training_free())
    assert get_patch(model).config.select_layers == list(get_patch(model).layers)
    flexkit.patch_model(plain("llava"), FlexConfig.training_free(high_res_states="features"))
    flexkit.patch_model(plain("llava"), FlexConfig.published(), trained=True)


def test_queries_all_share_one_selection() -> None:
    assert FlexConfig(queries="all").shares_selection
    assert not FlexConfig(queries="all", share_selection=False).shares_selection
    assert not FlexConfig().shares_selection
    assert not FlexConfig(queries=torch.ones(1, 2, dtype=torch.bool)).shares_selection


def test_what_is_left_to_the_model_is_said() -> None:
    with pytest.raises(flexkit.ConfigError, match="policy"):
        _ = FlexConfig().selector
    with pytest.raises(flexkit.ConfigError, match="zoom"):
        _ = FlexConfig().zoom_pair


def test_a_norm_behind_the_attention_is_none_in_front() -> None:
    config = ZOO["molmo2"].config()
    config.text_config.norm_after = True
    model = tf.Molmo2ForConditionalGeneration(config).eval()
    with pytest.raises(ConfigError, match="key_norm needs the norm in front of the attention"):
        flexkit.patch_model(model, FlexConfig(key_norm=True), trained=True)
    flexkit.patch_model(model, FlexConfig(), trained=True)
