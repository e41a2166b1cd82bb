"""Every public name is documented where it is defined and has a place in the API pages."""

import importlib
import inspect
import re
from pathlib import Path
from types import FunctionType

import pytest

import flexkit

PAGES = "\n".join(page.read_text("utf-8") for page in Path(__file__).parents[2].glob("docs/api/*.rst"))
NAMED = set(re.findall(r"^\.\. auto(?:class|data|function):: flexkit\.(\w+)$", PAGES, re.MULTILINE))
MODULES = re.findall(r"^\.\. automodule:: ([\w.]+)$", PAGES, re.MULTILINE)
LISTED = {(module, name) for module in MODULES for name in importlib.import_module(module).__all__}
TOP = {("flexkit", name) for name in flexkit.__all__ if not name.startswith("__")}


def _public_methods(thing: object) -> list[str]:
    own = vars(thing) if inspect.isclass(thing) else {}
    kinds = (FunctionType, property, classmethod, staticmethod)
    return [key for key, value in own.items() if isinstance(value, kinds) and not key.startswith("_")]


@pytest.mark.parametrize(("module", "name"), sorted(TOP | LISTED))
def test_has_a_docstring_and_so_have_its_methods(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    generated_by_dataclass = f"{name}("
    assert thing.__doc__ and not thing.__doc__.startswith(generated_by_dataclass)
    assert [method for method in _public_methods(thing) if not inspect.getdoc(getattr(thing, method))] == []


@pytest.mark.parametrize("name", sorted(name for _, name in TOP))
def test_is_on_an_api_page(name: str) -> None:
    assert name in NAMED | {name for _, name in LISTED}


def test_api_pages_name_public_things_only() -> None:
    assert {name for _, name in TOP} >= NAMED
