from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def forget_graphs() -> Iterator[None]:
    """What one test has compiled is nothing to another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
