"""The examples in the package's docstrings."""

import doctest
import importlib
import pkgutil
from importlib.util import find_spec

import pytest
import torch

import flexkit

ENGINES = {"flexkit.integrations.lmms_eval": "lmms_eval"}
"""What modules need that flexkit does not, and `make test-engines` installs."""
MODULES = [
    module.name
    for module in pkgutil.walk_packages(flexkit.__path__, "flexkit.")
    if not module.name.endswith("__main__") and find_spec(ENGINES.get(module.name, "flexkit"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    torch.manual_seed(0)
    results = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    assert results.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    examples = [case for name in MODULES for case in finder.find(importlib.import_module(name)) if case.examples]
    assert len(examples) >= 15
