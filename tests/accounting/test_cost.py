"""What is counted without weights is what real runs of small models compute and keep."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

import flexkit
from flexkit import Center, FlexConfig
from flexkit.__main__ import main
from flexkit.accounting import KNOWN
from flexkit.measuring import count_flops, kept_bytes
from flexkit.patching.memory import cached_memory
from flexkit.visual_search.weights import WEIGHTS
from tests.zoo import ZOO, Row, low_res, prompt

NAMES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl")
BILLIONS = {
    "llava-1.5-7b": 7.06,
    "llava-onevision-7b": 8.03,
    "qwen2.5-vl-7b": 8.29,
    "qwen3-vl-8b": 8.77,
    "internvl3-8b": 7.94,
    "gemma3-12b": 12.19,
}
"""Parameters that the models' cards state."""
SIZES = {"qwen2.5-vl-7b": 1008, "qwen3-vl-8b": 1024}
WORDS, NEW = 9, 3
WAYS: dict[str, dict[str, Any]] = {
    "flexkit": {"tiles": "all"},
    "flexkit_on_demand": {"tiles": "on_demand"},
    "flexkit_full": {"tiles": "all", "projection": "full"},
    "recompute": {"tiles": "all", "projection": "recompute"},
    "own_states": {
        "tiles": "on_demand",
        "high_res_states": "own",
        "select_layers": "all",
        "start_layer": 0,
        "select_from": "same",
    },
}
CONFIG = FlexConfig(start_layer=1, zoom=2, policy=Center(2))


def question(name: str) -> tuple[Any, dict[str, Tensor], int, int]:
    """A model, a prompt of one square picture and some words, the picture's side and the text tokens."""
    model = ZOO[name].model()
    grid = (2, 2) if ZOO[name].any_grid else None
    inputs = prompt(ZOO[name], [Row((grid,), WORDS)], zoom=(2, 2))
    if grid is None:
        side = inputs["hd_pixel_values"].shape[-1]
    else:
        side = int(inputs["hd_image_grid_thw"][0, 1]) * model.config.vision_config.patch_size
    image = int((inputs["input_ids"] == model.config.image_token_id).sum())
    return model, inputs, side, inputs["input_ids"].shape[1] - image


def run(model: Any, inputs: dict[str, Tensor]) -> tuple[int, int]:
    """Operations of a generation, and the bytes of the keys and values that it keeps."""
    kept: list[Any] = []

    def answer() -> None:
        output = model.generate(
            **inputs, max_new_tokens=NEW + 1, min_new_tokens=NEW + 1, do_sample=False, return_dict_in_generate=True
        )
        kept.append(output.past_key_values)

    flops = count_flops(answer)
    memory = cached_memory(kept[0])
    return flops, kept_bytes(kept[0]) - (memory.features.bytes if memory else 0)


@pytest.mark.parametrize("name", NAMES)
def test_low_res_and_flexkit(name: str) -> None:
    model, inputs, side, words = question(name)

    @cache
    def counted(tiles: int) -> dict[str, flexkit.Cost]:
        settings: dict[str, Any] = {"dtype": model.dtype, "config": CONFIG, "policy": CONFIG.policy, "tiles": tiles}
        return flexkit.cost(model, side, prompt=words, new_tokens=NEW, **settings)

    for way, settings in WAYS.items():
        flexkit.patch_model(model, CONFIG.replace(**settings), trained=True)
        with flexkit.trace(model) as trace:
            flops, kept = run(model, inputs)
        costs = counted(trace.steps[-1].tiles)
        flexkit.unpatch_model(model)
        assert costs[way].kv_bytes == kept
        assert costs[way].tflops * 1e12 == pytest.approx(flops, rel=1e-2), way
    assert costs["flexkit"].read_tokens == 8
    flops, kept = run(model, low_res(inputs))
    assert costs["low_res"].tflops * 1e12 == pytest.approx(flops, rel=2e-3)
    assert costs["low_res"].kv_bytes == kept


@pytest.fixture(scope="module")
def costs() -> dict[str, flexkit.Cost]:
    return flexkit.cost("llava-1.5-7b", 1008, prompt=60, new_tokens=5, selected=0.1)


def test_the_paper_s_figures(costs: dict[str, flexkit.Cost]) -> None:
    assert costs["flexkit"].tflops <= 13.5 and costs["flexkit_on_demand"].tflops <= 11.5
    assert costs["recompute"].tflops == pytest.approx(17.4, abs=0.1)
    assert costs["all_in_sequence"].language_flops == pytest.approx(93.1e12, rel=0.01)
    assert [costs[way].image_tokens for way in ("low_res", "flexkit", "all_in_sequence")] == [576, 576, 5760]
    larger = flexkit.cost("llava-1.5-7b", low_res_size=448)["low_res"]
    assert larger.image_tokens == 1024 and 14 < larger.tflops < 18


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "llava-1.5-7b"])
def test_other_known_models(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(KNOWN[name]())
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(BILLIONS[name], abs=0.02)
    costs = flexkit.cost(name, SIZES.get(name))
    order = ("low_res", "flexkit_on_demand", "flexkit", "all_in_sequence")
    assert costs["low_res"].tflops < costs["own_states"].tflops < costs["all_in_sequence"].tflops
    assert costs["best_tile"].vision_flops == 2 * costs["low_res"].vision_flops
    flops = [costs[way].tflops for way in order]
    assert flops == sorted(flops)
    kept = [costs[way].kv_bytes for way in ("low_res", "flexkit", "flexkit_full")]
    assert kept == sorted(set(kept))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_base_model_at_the_high_resolution(name: str) -> None:
    model, _, side, words = question(name)
    settings = {"prompt": words, "new_tokens": 0, "config": CONFIG.replace(zoom=None)}
    costs = flexkit.cost(model, side, **settings)
    assert costs["high_res"] == flexkit.cost(model, low_res_size=side, **settings)["low_res"]
    assert costs["high_res"].vision_flops > costs["low_res"].vision_flops
    assert list(costs)[:2] == ["low_res", "high_res"]


def test_a_tower_of_one_size_alone_has_no_such_row() -> None:
    assert "high_res" not in flexkit.cost(ZOO["perception_lm"].model())


def test_what_cannot_be_counted() -> None:
    with pytest.raises(flexkit.ConfigError, match="multiple of the 336 pixels"):
        flexkit.cost("llava-1.5-7b", 1000)
    with pytest.raises(flexkit.ConfigError, match="for example 1008"):
        flexkit.cost("qwen2.5-vl-7b", 1000)
    with pytest.raises(flexkit.ConfigError, match="depends on the map"):
        flexkit.cost("llava-1.5-7b", policy=flexkit.Threshold(0.2))
    with pytest.raises(flexkit.ConfigError, match="from 0 to 1"):
        flexkit.cost("llava-1.5-7b", selected=2.0)
    with pytest.raises(flexkit.UnsupportedModelError, match="one size"):
        flexkit.cost(ZOO["llava-pixtral"].model(), 64)


def test_command(
    costs: dict[str, flexkit.Cost], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = str(WEIGHTS / "base")
    arguments = ["cost", small, "--image-size", "192", "--selected", "0.1"]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {way: cost.to_dict() for way, cost in flexkit.cost(small, 192).items()}
    for way in ("low_res", "flexkit", "flexkit_on_demand", "recompute", "all_in_sequence"):
        assert printed[way].keys() >= {"tflops", "image_tokens", "kv_bytes"}
    assert main(["cost", "llava-1.5-7b", "--image-size", "1000"]) == 2
    assert "multiple of the 336 pixels" in capsys.readouterr().err
    monkeypatch.setattr(flexkit, "cost", lambda *args, **kwargs: costs)
    assert main(arguments) == 0 and "flexkit_on_demand" in capsys.readouterr().out
