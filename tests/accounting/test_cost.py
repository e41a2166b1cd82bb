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
from tests.zoo import VIDEOS, ZOO, Row, low_res, prompt

NAMES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl")
IN_TIME = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video", "video_llava")
VIDEOS_OF = [f"{name}-video" for name in IN_TIME if f"{name}-video" in VIDEOS]
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


def question(name: str, zoom: tuple[int, int, int] = (1, 2, 2)) -> tuple[Any, dict[str, Tensor], int, dict[str, int]]:
    """A model, a prompt of one square picture or video and some words, its side, and numbers of tokens and frames."""
    family = ZOO[name]
    model, axes = family.model(), len(family.grid)
    inputs = prompt(family, [Row(((2, 2, 2)[:axes] if family.any_grid else None,), WORDS)], zoom=zoom[-axes:])
    kind = "video" if axes == 3 else "image"
    if family.any_grid:
        side = int(inputs[f"hd_{kind}_grid_thw"][0, 1]) * model.config.vision_config.patch_size
    else:
        side = inputs["hd_pixel_values_videos" if axes == 3 else "hd_pixel_values"].shape[-1]
    shown = int((inputs["input_ids"] == getattr(model.config, f"{kind}_token_id")).sum())
    numbers = {"prompt": inputs["input_ids"].shape[1] - shown, "new_tokens": NEW}
    if axes == 3:  # the tower of Qwen2-VL merges two
        together = model.config.vision_config.temporal_patch_size if family.any_grid else 1
        numbers["frames"] = together * (2 if family.any_grid else family.grid[0])
    return model, inputs, side, numbers


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


@pytest.mark.parametrize("name", [*NAMES, *VIDEOS_OF])
def test_low_res_and_flexkit(name: str) -> None:
    check(*question(name), CONFIG)


@pytest.mark.parametrize("name", ["qwen2_5_vl-video", "llava_onevision-video"])
def test_more_frames(name: str) -> None:
    """Zoomed in time as well, with all frames looked at, or one."""
    for zoom, policy in (((3, 2, 2), Center(2)), ((3, 1, 1), first_frame)):
        config = CONFIG.replace(zoom=zoom, policy=policy)
        check(*question(name, zoom), config, ("flexkit", "flexkit_on_demand"))


def first_frame(scores: Tensor) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[..., 0, :, :] = True
    return mask


def check(model: Any, inputs: Any, side: int, numbers: Any, config: FlexConfig, ways: Any = tuple(WAYS)) -> None:
    """Hold counts against runs of the base model, and of ways to patch it."""

    @cache
    def counted(tiles: int) -> dict[str, flexkit.Cost]:
        settings: dict[str, Any] = {"dtype": model.dtype, "config": config, "policy": config.policy, "tiles": tiles}
        return flexkit.cost(model, side, **numbers, **settings)

    for way in ways:
        flexkit.patch_model(model, config.replace(**WAYS[way]), trained=True)
        with flexkit.trace(model) as trace:
            flops, kept = run(model, inputs)
        costs, mask = counted(trace.steps[-1].tiles), trace.mask(-1, trace.layers[-1])
        flexkit.unpatch_model(model)
        assert costs[way].kv_bytes == kept
        assert costs[way].tflops * 1e12 == pytest.approx(flops, rel=2e-2 if way == "recompute" else 1e-2), way
    flops, kept = run(model, low_res(inputs))
    assert costs["low_res"].tflops * 1e12 == pytest.approx(flops, rel=2e-3)
    assert costs["low_res"].kv_bytes == kept
    assert costs["flexkit"].read_tokens == int(mask.sum())
    everything, more = costs["all_in_sequence"], mask[0].numel()
    longer = flexkit.cost(
        model, side, **numbers | {"prompt": numbers["prompt"] + more}, dtype=model.dtype, config=config
    )["low_res"]
    assert everything.image_tokens == costs["low_res"].image_tokens + more
    assert (everything.language_flops, everything.kv_bytes) == (longer.language_flops, longer.kv_bytes)
    assert everything.vision_flops == costs["flexkit"].vision_flops


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


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen2_5_vl-video", "llava_onevision-video"])
def test_the_base_model_at_the_high_resolution(name: str) -> None:
    model, _, side, numbers = question(name)
    costs = flexkit.cost(model, side, **numbers, config=CONFIG.replace(zoom=None))
    larger = flexkit.cost(model, low_res_size=side, **numbers, config=CONFIG.replace(zoom=None))
    assert costs["high_res"] == larger["low_res"]
    assert costs["high_res"].vision_flops > costs["low_res"].vision_flops
    assert list(costs)[:2] == ["low_res", "high_res"]


def test_a_tower_of_one_size_alone_has_no_such_row() -> None:
    assert "high_res" not in flexkit.cost(ZOO["perception_lm"].model())


def test_what_a_video_costs() -> None:
    """Of frames that do not fill the last one of the grid, the last is repeated; policies judge each, or all."""
    model, config = ZOO["qwen2_5_vl"].model(), FlexConfig(zoom=(2, 3, 3))
    costs = flexkit.cost(model, low_res_size=112, frames=7, config=config)
    assert costs == flexkit.cost(model, 336, frames=8, config=config)
    assert [costs[way].image_tokens for way in ("low_res", "all_in_sequence")] == [64, 64 + 64 * 18]
    assert costs["flexkit"].read_tokens == round(0.1 * 64 * 18)
    for policy, read in ((flexkit.TopK(2), 4 * 2 * 4), (flexkit.TopK(2).over_frames(), 2 * 4)):
        costs = flexkit.cost(ZOO["llava_onevision"].model(), frames=4, policy=policy, config=FlexConfig(zoom=2))
        assert costs["flexkit"].read_tokens == read
    picture = flexkit.cost(ZOO["llava"].model(), policy=flexkit.TopK(2).over_frames())
    assert picture["flexkit"].read_tokens == 2 * 9


def test_what_cannot_be_counted() -> None:
    with pytest.raises(flexkit.ConfigError, match="multiple of the 336 pixels"):
        flexkit.cost("llava-1.5-7b", 1000)
    with pytest.raises(flexkit.ConfigError, match="for example 1008"):
        flexkit.cost("qwen2.5-vl-7b", 1000)
    with pytest.raises(flexkit.ConfigError, match="depends on the map"):
        flexkit.cost("llava-1.5-7b", policy=flexkit.Threshold(0.2))
    with pytest.raises(flexkit.ConfigError, match="from 0 to 1"):
        flexkit.cost("llava-1.5-7b", selected=2.0)
    with pytest.raises(flexkit.ConfigError, match="must be 672, 2 times 336 pixels as zoom= says, got 1008"):
        flexkit.cost("llava-1.5-7b", 1008, config=FlexConfig(zoom=2))
    with pytest.raises(flexkit.ConfigError, match="views are square"):
        flexkit.cost("llava-1.5-7b", config=FlexConfig(zoom=(2, 3)))
    with pytest.raises(flexkit.ConfigError, match="frames must be an int of at least 1"):
        flexkit.cost("qwen2.5-vl-7b", 1008, frames=0)
    with pytest.raises(flexkit.UnsupportedModelError, match=r"reads no videos .* leave out frames="):
        flexkit.cost("llava-1.5-7b", frames=8)
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
    video = ["cost", "qwen2.5-vl-7b", "--frames", "4", "--low-res-size", "112"]
    assert main([*video, "--zoom", "2", "3", "3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = flexkit.cost("qwen2.5-vl-7b", low_res_size=112, frames=4, config=FlexConfig(zoom=(2, 3, 3)))
    assert printed == {way: cost.to_dict() for way, cost in expected.items()}
    assert main(["cost", small, "--zoom", "2", "--image-size", "192"]) == 2
    assert "--image-size must be 128, 2 times 64 pixels as --zoom says, got 192" in capsys.readouterr().err
    assert main(["cost", small, "--frames", "2"]) == 2
    assert "reads no videos in a high-res view; leave out --frames." in capsys.readouterr().err
    monkeypatch.setattr(flexkit, "cost", lambda *args, **kwargs: costs)
    assert main(arguments) == 0 and "flexkit_on_demand" in capsys.readouterr().out
