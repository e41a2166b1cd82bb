from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import flexkit
from flexkit.visual_search import draw_scene
from tests.scripts import load_example

pytest.importorskip("tifffile")
pytest.importorskip("zarr")
pytest.importorskip("resource")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    module = load_example("huge_picture")
    module.SMALL, module.TIMES, module.TILE = 200, 7, 112  # 1400 pixels a side
    return module


def test_it_saves_what_it_drew(example: ModuleType, tmp_path: Path) -> None:
    scene = draw_scene(5, example.SMALL)
    example.save_enlarged(scene, tmp_path / "scene.tif")
    source = flexkit.open_tiff(tmp_path / "scene.tif")
    assert source.size == (1400, 1400)
    assert np.array_equal(source.region(0, 0, 1400, 1400)[3::7, 3::7], np.asarray(scene.image))


def test_the_language_model_computes_the_same(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    question, _, _, *lines = capsys.readouterr().out.strip().splitlines()
    large, pyramid, small = (line.split() for line in lines)
    digit = question.split()[-1].strip(".)")
    assert large[3] == pyramid[3] == small[3] == digit
    costs = [float(line[8]) for line in (large, pyramid, small)]
    assert max(costs) / min(costs) < 1.05
    assert int(pyramid[5]) < 40 and pyramid[7] == "819"
