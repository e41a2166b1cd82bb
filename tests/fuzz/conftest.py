"""Tests of this folder bear the mark "fuzz": few examples in the suite, many by ``make fuzz``."""

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("fuzz")
