from pathlib import Path
from typing import Any

import pytest
import torch

import flexkit
from flexkit.errors import CheckpointError, ConfigError
from flexkit.integrations.loading import load_model_and_processor
from flexkit.patching import get_patch
from flexkit.visual_search import draw_scene, load_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for stage in ("base", "tuned"):
        model, processor = load_model(stage)
        model.save_pretrained(root / stage)
        processor.save_pretrained(root / stage)
    return root


def answer(model: Any, processor: Any, image: Any, question: str) -> str:
    inputs = flexkit.FlexProcessor(processor, model)(images=image, text=f"<image> {question}", return_tensors="pt")
    return str(processor.decode(model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, -2]))


def test_a_saved_model(folders: Path) -> None:
    model, processor = load_model_and_processor(str(folders / "tuned"), dtype="float32")
    assert answer(model, processor, draw_scene(0).image, "Which digit is on the object that is yellow?") == "9"
    other, _ = load_model_and_processor(str(folders / "tuned"), settings={"policy": flexkit.Nothing()})
    assert get_patch(model).config.policy == flexkit.TopK(6) and get_patch(other).config.policy == flexkit.Nothing()


def test_a_saved_model_whose_code_is_trusted(folders: Path) -> None:
    model, processor = load_model_and_processor(str(folders / "tuned"), trust_remote_code=True)
    assert answer(model, processor, draw_scene(0).image, "Which digit is on the object that is yellow?") == "9"


def test_a_base_model(folders: Path) -> None:
    name = str(folders / "base")
    model, _ = load_model_and_processor(name, "training_free", {"zoom": 4, "gate": None})
    config = get_patch(model).config
    assert (config.high_res_states, config.zoom, config.gate) == ("own", (4, 4), None) and not model.training
    with pytest.warns(flexkit.UntrainedProjectionsWarning):
        model, _ = load_model_and_processor(name, "published")
    assert get_patch(model).config.select_from == "previous"
    model, _ = load_model_and_processor(name, "none", dtype="float64")
    assert not flexkit.is_patched(model) and model.dtype == torch.float64


def test_mistakes(folders: Path, tmp_path: Path) -> None:
    saved, base = str(folders / "tuned"), str(folders / "base")
    with pytest.raises(ConfigError, match="preset is one of published, training_free, none, got 'best'"):
        load_model_and_processor(base, "best")
    with pytest.raises(
        ConfigError, match=r"gate, zoom cannot be set of .*tuned, which is patched already: give a preset"
    ):
        load_model_and_processor(saved, settings={"zoom": 3, "gate": 1.0, "policy": flexkit.Nothing()})
    with pytest.raises(ConfigError, match="policy cannot be set of a base model that is not patched"):
        load_model_and_processor(base, "none", {"policy": flexkit.Nothing()})
    with pytest.raises(ConfigError, match=r"unknown settings \['zooom'\]"):
        load_model_and_processor(base, "training_free", {"zooom": 3})
    with pytest.raises(CheckpointError, match="For a base model, give a preset: published, training_free, none"):
        load_model_and_processor(base)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model_and_processor(str(tmp_path), "none")
