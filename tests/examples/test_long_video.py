"""The example that asks about ten minutes of video."""

from pathlib import Path

import pytest

from tests.processors import TORCHVISION
from tests.scripts import load_example


@pytest.mark.skipif(not TORCHVISION, reason="video processors need torchvision")
def test_a_long_video_costs_what_a_short_one_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = load_example("long_video")
    model, processor = example.build()
    flops = []
    for seconds in (5, 50):
        path = tmp_path / f"{seconds}.mp4"
        example.write(path, seconds)
        flops.append(example.ask(path, model, processor)[0])
    assert flops[1] == pytest.approx(flops[0], rel=0.05)
    short, long = capsys.readouterr().out.splitlines()
    assert short.split()[:3] == ["5", "s", "125"] and long.split()[:3] == ["50", "s", "1250"]
    assert int(long.split()[4]) < 1250
