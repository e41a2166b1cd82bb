"""``flexkit inspect`` says of any model whether it can be patched, and what that does."""

import csv
import json
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

import flexkit
from flexkit.__main__ import main
from flexkit.accounting.inspection import inspect_model
from flexkit.patching import get_patch
from flexkit.visual_search import load_model
from flexkit.visual_search.weights import WEIGHTS
from tests.matrix import MATRIX


def test_it_says_what_patching_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "llava-1.5-7b"]) == 0
    printed = capsys.readouterr().out
    assert "LlavaForConditionalGeneration (llava) can be patched." in printed
    assert "zoom 3 x 3, tiles" in printed and "9 to 31, 23 of 32" in printed
    # Two square projections of width 4096 in each of 23 layers.
    assert f"{2 * 4096**2 * 23 / 1e6:.1f} M" in printed
    assert "TFLOP reading a tenth" in printed
    assert "0 B more, by FlexConfig.training_free()" in printed


def test_a_folder_says_what_its_model_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(WEIGHTS / "base"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = flexkit.patch_model(load_model("base")[0], trained=True)
    assert found["image_tokens"] == 64 and found["view"] == "tiles"
    assert found["added_parameters"] == sum(parameter.numel() for parameter in flexkit.flex_parameters(model))
    assert found["reading_layers"] == list(get_patch(model).reading)
    assert found["costs"]["flexkit"]["tflops"] < found["costs"]["all_in_sequence"]["tflops"]


@pytest.mark.parametrize(("name", "view"), [("qwen2_5_vl", "whole"), ("gemma3", "tiles"), ("blip-2", "whole")])
def test_model_types_are_enough(name: str, view: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model_type"] == name and found["view"] == view
    assert found["added_parameters"] > 0
    # What no token can pass through reads by copies of its own.
    assert (found["training_free_bytes"] > 0) == (name == "blip-2")


def test_it_says_how_videos_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    """As the table of supported models does."""
    with MATRIX.open(encoding="utf-8") as file:
        table = {row["model type"]: row["videos"] for row in csv.DictReader(file)}
    kinds = {"qwen2_vl": "frames", "llava_onevision": "tiles", "video_llama_3": "whole", "molmo2": None, "gemma3": None}
    for name, view in kinds.items():
        if name in CONFIG_MAPPING:
            found = inspect_model(name)
            assert (found.videos, found.video_view) == (table[name], view)
    for name, told in (("llava_onevision", "encoded when they are read (FixedFrames)"), ("gemma3", "takes none")):
        assert main(["inspect", name]) == 0
        assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("bert", "no model that transformers generates text about images with"),
        ("pi0", "pi0"),
        ("no/such-model", "is none of llava-1.5-7b"),
    ],
)
def test_what_cannot_be_patched_is_told_in_one_line(name: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", name]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and told in printed.err and printed.err.count("\n") == 1


def test_no_folder_is_taken_for_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
