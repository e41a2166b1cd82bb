"""The weights that ship do what the docs say they do."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

import flexkit
from flexkit.visual_search.evaluation import Batch, Score, score
from flexkit.visual_search.ways import load_ways
from flexkit.visual_search.weights import READERS, WEIGHTS, load_model

pytestmark = pytest.mark.no_cover  # hundreds of questions to lines that the other tests of this folder cover


def accuracies(track: str, *names: str) -> dict[str, float]:
    ways = load_ways(WEIGHTS, READERS[track])
    batches = [Batch.draw(track, 20261123, range(first, first + 25)) for first in range(0, 100, 25)]
    return {name: Score.mean([score(ways[name], batch) for batch in batches]).accuracy for name in names}


# Bounds lie below what thousands of questions say by three standard errors of a hundred.
def test_details_are_read_where_the_model_looks() -> None:
    of = accuracies("attribute", "low_res", "flexkit", "random", "center", "oracle", "all_in_sequence")
    assert of["low_res"] < 0.2 and max(of["random"], of["center"]) < 0.5
    assert of["flexkit"] > 0.94 and of["flexkit"] > 0.95 * of["oracle"]
    assert of["flexkit"] > of["all_in_sequence"] - 0.05


def test_details_of_what_takes_two_words_to_name_are_read() -> None:
    of = accuracies("conjunction", "low_res", "flexkit")
    assert of["low_res"] < 0.2 and of["flexkit"] > 0.8


def test_what_the_low_res_view_shows_is_not_lost() -> None:
    of = accuracies("low-res", "low_res", "flexkit")
    assert of["flexkit"] >= of["low_res"] - 0.04 and of["low_res"] > 0.9


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


def test_letters_are_those_of_what_is_read() -> None:
    of = accuracies("choices", "low_res", "flexkit", "all_in_sequence")
    assert of["low_res"] < 0.25 + 4 * (0.25 * 0.75 / 100) ** 0.5
    assert min(of["flexkit"], of["all_in_sequence"]) > 0.78
