"""The benchmark runs, in little, and says what it ran on."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import compiled, language_model
from benchmarks.report import ratios


def test_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "ZOOM", 2)
    path = tmp_path / "found.json"
    language_model.main(["--width", "128", "--layers", "2", "--rounds", "1", "--device", "cpu", "--output", str(path)])
    found = json.loads(path.read_text())
    assert found["image_tokens"] == 576 and found["high_res_tokens"] == 4 * 576
    assert found["dtype"] == "float32" and found["language_model"]["layers"] == 2
    ways = {"base", "best_tile", "flexkit", "flexkit_moving", "own_states", "recompute"}
    assert set(found["ratios"]["decode"]) == ways
    assert found["ratios"]["decode"]["base"] == 1
    assert set(found["ratios"]["prefill_of_all"]) == {"flexkit", "all_in_sequence"}


def test_compiled_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []
    # To compile takes minutes; the tests of compiled steps do.
    monkeypatch.setattr(torch, "compile", lambda step, *, fullgraph: graphs.append(fullgraph) or step)
    monkeypatch.setattr(compiled, "ZOOM", 2)
    path = tmp_path / "found.json"
    compiled.main(["--width", "128", "--layers", "2", "--rounds", "1", "--device", "cpu", "--output", str(path)])
    found = json.loads(path.read_text())
    assert set(found["ratios"]) == {"base", "top_k", "one_selection"} and found["ratios"]["base"] == 1
    assert graphs == [True] * 3


def test_ratios_are_medians_over_rounds() -> None:
    seconds = {"base": [1.0, 2.0, 4.0], "other": [2.0, 2.0, 12.0]}
    assert ratios(seconds, "base") == {"base": 1.0, "other": 2.0}
