import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from flexkit.checkpoints import load_flex, save_flex
from flexkit.errors import CheckpointError, ConfigError, PatchError, PolicyError
from flexkit.patching import (
    FlexConfig,
    added_parameters,
    flex_parameters,
    get_patch,
    is_patched,
    patch_model,
    set_alpha,
    unpatch_model,
)
from flexkit.selection import Border, Schedule, Threshold, TopK

MakeLlava = Callable[..., LlavaForConditionalGeneration]
EditJson = Callable[..., None]
EditTensors = Callable[[Path, Callable[[dict[str, Tensor]], Any]], None]

CONFIG = FlexConfig.published(start_layer=2, zoom=2, policy=Threshold(0.3).pooled(2))


def trained(model: LlavaForConditionalGeneration, config: FlexConfig = CONFIG) -> LlavaForConditionalGeneration:
    patch_model(model, config, trained=True)
    with torch.no_grad():
        for parameter in flex_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    return model


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def logits(model: LlavaForConditionalGeneration) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.cat([torch.full((1, 16), 39), torch.tensor([[3, 4, 5]])], dim=1)
    low = torch.randn(1, 3, 56, 56, generator=generator)
    high = torch.randn(1, 3, 112, 112, generator=generator)
    with torch.no_grad():
        return model(ids, pixel_values=low, hd_pixel_values=high).logits


@pytest.fixture
def saved(tmp_path: Path, make_llava: MakeLlava) -> Path:
    save_flex(trained(make_llava()), tmp_path / "saved")
    return tmp_path / "saved"


policies = st.one_of(
    st.builds(TopK, st.integers(1, 9)),
    st.builds(lambda value: Threshold(value).pooled(3) & ~Border(1), st.floats(0, 0.9)),
    st.builds(lambda k: Schedule({0: TopK(k), 3: Border(1).dilated(1)}), st.integers(1, 4)),
)
configs = st.builds(
    FlexConfig,
    start_layer=st.integers(1, 3),
    zoom=st.sampled_from([1, 2, (1, 3)]),
    policy=policies,
    queries=st.sampled_from(["last", "all"]),
    select_from=st.sampled_from(["previous", "same"]),
    low_res_keys=st.sampled_from(["keep", "replace"]),
    positions=st.sampled_from(["interpolated", "fractional"]),
    gate=st.sampled_from([None, 1.0]),
    budget=st.sampled_from([None, 5, 0.5]),
    heads=st.sampled_from([None, (0,), (0, 1)]),
    alpha=st.sampled_from([1.0, 0.25]),
)


@given(configs)
def test_round_trip_keeps_every_bit_and_setting(make_llava: MakeLlava, config: FlexConfig) -> None:
    original = trained(make_llava(), config)
    with TemporaryDirectory() as folder:
        save_flex(original, folder)
        loaded = load_flex(make_llava(), folder)
    assert same(loaded.state_dict(), original.state_dict())
    assert get_patch(loaded).config.to_dict() == get_patch(original).config.to_dict()


def test_loaded_model_computes_the_same(saved: Path, make_llava: MakeLlava) -> None:
    base = make_llava()
    loaded = load_flex(base, saved)
    assert loaded is base
    torch.manual_seed(0)
    untrained = patch_model(make_llava(), CONFIG, trained=True)
    original = make_llava()
    torch.manual_seed(0)
    assert not torch.equal(logits(loaded), logits(untrained))
    original = load_flex(patch_model(original, CONFIG, trained=True), saved)
    assert torch.equal(logits(loaded), logits(original))


def test_only_what_was_added_is_written(saved: Path, make_llava: MakeLlava) -> None:
    assert {path.name for path in saved.iterdir()} == {"flexkit.weights", "flexkit.json"}
    loaded = load_flex(make_llava(), saved)
    assert load_file(saved / "flexkit.weights").keys() == added_parameters(loaded).keys()
    assert loaded.state_dict().keys() >= added_parameters(loaded).keys()
    settings = json.loads((saved / "flexkit.json").read_text())
    assert (settings["format_version"], settings["model_type"]) == (1, "llava")


def test_saving_again_replaces_and_leaves_no_drafts(saved: Path, make_llava: MakeLlava) -> None:
    model = load_flex(make_llava(), saved)
    with torch.no_grad():
        for parameter in flex_parameters(model):
            parameter.zero_()
    save_flex(model, saved)
    assert len(list(saved.iterdir())) == 2
    assert not any(weight.any() for weight in added_parameters(load_flex(make_llava(), saved)).values())


def test_a_failed_save_keeps_the_old_files(saved: Path, make_llava: MakeLlava, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def half(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setitem(save_flex.__globals__, "save_file", half)
    with pytest.raises(CheckpointError, match="saved cannot be written: disk full"):
        save_flex(trained(make_llava()), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_weights_take_the_models_dtype(saved: Path, make_llava: MakeLlava) -> None:
    loaded = load_flex(make_llava().to(torch.bfloat16), saved)
    for name, tensor in load_file(saved / "flexkit.weights").items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16())


def test_loading_into_a_patched_model(saved: Path, make_llava: MakeLlava) -> None:
    model = patch_model(make_llava(), CONFIG, trained=True)
    parameters = list(flex_parameters(model))
    assert load_flex(model, saved) is model
    assert all(ours is theirs for ours, theirs in zip(parameters, flex_parameters(model), strict=True))
    expected = load_file(saved / "flexkit.weights")
    assert all(torch.equal(weight, expected[name]) for name, weight in added_parameters(model).items())


def test_a_patched_model_with_other_settings_is_left_alone(saved: Path, make_llava: MakeLlava) -> None:
    model = patch_model(make_llava(), CONFIG.replace(zoom=(2, 3), logit_bias=1.0), trained=True)
    set_alpha(model, 0.5)
    before = snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        load_flex(model, saved)
    for difference in (
        "alpha is 1.0 in the folder and 0.5 in the model",
        "logit_bias is 0.0 in the folder and 1.0 in the model",
        "zoom is [2, 2] in the folder and [2, 3] in the model",
    ):
        assert difference in str(caught.value)
    assert "policy" not in str(caught.value)
    assert same(model.state_dict(), before)


def test_policy_takes_the_place_of_the_saved_one(saved: Path, make_llava: MakeLlava) -> None:
    model = load_flex(make_llava(), saved, policy=TopK(2))
    assert get_patch(model).config.policy == TopK(2)
    load_flex(model, saved, policy=TopK(2))
    with pytest.raises(CheckpointError, match=r"policy is .*Pooled.* in the folder and .*TopK"):
        load_flex(model, saved)
    schedule = Schedule({0: TopK(1)})
    assert get_patch(load_flex(make_llava(), saved, policy=schedule)).config.policy == schedule


def brightest(scores: Tensor) -> Tensor:
    return scores == scores.amax((-1, -2), keepdim=True)


def test_a_custom_policy_has_to_be_given_again(tmp_path: Path, make_llava: MakeLlava) -> None:
    model = trained(make_llava(), CONFIG.replace(policy=brightest))
    save_flex(model, tmp_path)
    base = make_llava()
    with pytest.raises(CheckpointError, match=r"'brightest', which is not one of flexkit's own; .*policy="):
        load_flex(base, tmp_path)
    assert not is_patched(base)
    assert same(load_flex(base, tmp_path, policy=brightest).state_dict(), model.state_dict())
    load_flex(model, tmp_path)


def test_refuses_a_policy_that_is_none(saved: Path, make_llava: MakeLlava) -> None:
    for model in (make_llava(), patch_model(make_llava(), CONFIG, trained=True)):
        with pytest.raises((CheckpointError, PolicyError), match="policy"):
            load_flex(model, saved, policy="brightest")  # type: ignore[arg-type]


def drop(tensors: dict[str, Tensor]) -> None:
    tensors.popitem()


def add(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = torch.zeros(40, 16)


def reshape(tensors: dict[str, Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name][:4]


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(drop, "1 missing: "), (add, "1 not expected: lm_head.weight"), (reshape, "1 of another shape: ")],
)
def test_wrong_tensors_leave_the_model_as_it_was(
    saved: Path,
    make_llava: MakeLlava,
    edit_tensors: EditTensors,
    damage: Callable[[dict[str, Tensor]], None],
    message: str,
    patched: bool,
) -> None:
    edit_tensors(saved / "flexkit.weights", damage)
    model = make_llava()
    if patched:
        patch_model(model, CONFIG, trained=True)
    before, types = snapshot(model), [type(module) for module in model.modules()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(CheckpointError, match=message):
        load_flex(model, saved)
    assert is_patched(model) == patched
    assert same(model.state_dict(), before)
    assert [type(module) for module in model.modules()] == types
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, r"format version 2, this flexkit reads 1"),
        ({"format_version": None}, r"format version None"),
        ({"model_type": "qwen2_vl"}, r"type 'qwen2_vl', this one is 'llava'"),
        ({"config": "published"}, r'no "config" object'),
        ({"config": {"sharpness": 3}}, r"flexkit\.json: .*sharpness"),
        ({"config": {"alpha": 7}}, r"flexkit\.json: alpha must lie in"),
        ({"config": {"alpha": "much"}}, r"flexkit\.json"),
        ({"config": {"policy": {"type": "Pickle"}}}, r"flexkit\.json: .*Pickle"),
        ({"config": {"start_layer": 4}}, r"flexkit\.json does not fit this LlavaFor.*: start_layer"),
    ],
)
def test_refuses_settings(
    saved: Path, make_llava: MakeLlava, edit_json: EditJson, changes: dict[str, Any], message: str
) -> None:
    edit_json(saved / "flexkit.json", **changes)
    model = make_llava()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        load_flex(model, saved)
    assert not is_patched(model)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("name", ["flexkit.json", "flexkit.weights"])
def test_refuses_an_incomplete_folder(saved: Path, make_llava: MakeLlava, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_flex(make_llava(), saved)


def test_refuses_a_model_of_another_depth(saved: Path, make_llava: MakeLlava) -> None:
    with pytest.raises(CheckpointError, match="2 missing"):
        load_flex(make_llava(num_hidden_layers=5), saved)


def test_only_a_patched_model_can_be_saved(tmp_path: Path, make_llava: MakeLlava) -> None:
    with pytest.raises(PatchError, match="not patched"):
        save_flex(make_llava(), tmp_path / "new")
    queries = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ConfigError, match="queries"):
        save_flex(trained(make_llava(), CONFIG.replace(queries=queries)), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_base_model_is_the_same_after_unpatching(saved: Path, make_llava: MakeLlava) -> None:
    loaded = unpatch_model(load_flex(make_llava(), saved))
    assert same(loaded.state_dict(), make_llava().state_dict())
