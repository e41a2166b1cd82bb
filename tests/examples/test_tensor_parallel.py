import re

import pytest

from tests.scripts import load_example


def test_in_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    load_example("tensor_parallel").main()
    told = re.search(r"1 process: (\d) \(It is (\d)", capsys.readouterr().out)
    assert told is not None and told[1] == told[2]
