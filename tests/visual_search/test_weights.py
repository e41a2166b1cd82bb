"""The weights that ship do what the docs say they do."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

import flexkit
from flexkit.visual_search.evaluation import evaluate
from flexkit.visual_search.weights import WEIGHTS, load_model


@pytest.fixture(scope="module", params=["attribute", "low-res"])
def accuracy(request: pytest.FixtureRequest) -> tuple[str, dict[str, float]]:
    scores = evaluate(20261123, 100, tracks=[request.param], quiet=True)
    assert scores is not None
    return request.param, {name: score["accuracy"] for name, score in scores[request.param].items()}


def test_details_are_read_where_the_model_looks(accuracy: tuple[str, dict[str, float]]) -> None:
    track, of = accuracy
    if track == "low-res":
        assert of["flexkit"] >= of["low_res"] - 0.02 and of["low_res"] > 0.9
    else:
        assert of["low_res"] < 0.2 and max(of["random"], of["center"]) < 0.45
        # Below what thousands of questions say by three standard errors.
        assert of["flexkit"] > 0.9 and of["flexkit"] > 0.95 * of["oracle"]


def test_they_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 10e6
    card = (WEIGHTS / "README.md").read_text()
    for stage in (path.name for path in WEIGHTS.iterdir() if path.is_dir()):
        assert f"`{stage}`" in card


@pytest.mark.parametrize("stage", [path.name for path in WEIGHTS.glob("*") if path.is_dir()])
def test_they_load_as_any_other(stage: str, tmp_path: Path) -> None:
    model, processor = load_model(stage)
    assert not model.training and {weight.dtype for weight in model.parameters()} == {next(model.parameters()).dtype}
    assert flexkit.is_patched(model) == isinstance(processor, flexkit.FlexProcessor)
    for path in (WEIGHTS / stage).glob("*.safetensors"):
        assert {value.element_size() for value in load_file(path).values()} == {2}
