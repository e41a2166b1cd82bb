import math
from types import ModuleType

import numpy as np
import pytest

from flexkit import FlexProcessor
from tests.scripts import load_example


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_example("train_projections")


def test_it_learns_and_says_so(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    losses = script.main()
    assert len(losses) == 12 and losses[-1] < math.log(2)
    assert capsys.readouterr().out.strip().endswith("answered rightly: 1.00, loaded again: 1.00")


def test_the_low_res_view_is_grey(script: ModuleType) -> None:
    collator = script.Collator(FlexProcessor(script.load_model("base")[1], 3))
    views = []
    for answer in script.ANSWERS:
        np.random.seed(0)
        views.append(collator([{"image": script.striped(answer), "answer": answer}]))
    inside = (..., slice(4, -4), slice(4, -4))  # the resampling kernel is cut off at the edge
    low_res, high_res = (
        abs(views[0][key] - views[1][key])[inside].max() for key in ("pixel_values", "hd_pixel_values")
    )
    assert low_res < 0.05 and high_res > 1
