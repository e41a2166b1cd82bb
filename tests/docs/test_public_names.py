"""Every public name is documented where it is defined; that it has a place in the pages, their build checks."""

import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import flexkit
from tests.scripts import load_script

DOCS = Path(__file__).parents[2] / "docs"
documented = load_script(DOCS / "documented.py")
PAGES = "\n".join(page.read_text("utf-8") for page in DOCS.glob("api/*.rst"))
NAMED = set(re.findall(r"^\.\. auto(?:class|data|function):: flexkit\.(\w+)$", PAGES, re.MULTILINE))
MODULES = re.findall(r"^\.\. automodule:: ([\w.]+)$", PAGES, re.MULTILINE)
LISTED = {(module, name) for module in MODULES for name in importlib.import_module(module).__all__}
TOP = {("flexkit", name) for name in flexkit.__all__ if not name.startswith("__")}


@pytest.mark.parametrize(("module", "name"), sorted(TOP | LISTED))
def test_has_a_docstring_and_so_have_its_methods(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    generated_by_dataclass = f"{name}("
    assert thing.__doc__ and not thing.__doc__.startswith(generated_by_dataclass)
    assert [method for method in documented.public_methods(thing) if not inspect.getdoc(getattr(thing, method))] == []


def test_the_build_misses_what_no_page_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """``docs/documented.py`` warns, which fails the build; here of one name and one method taken from the pages."""
    pages = {f"flexkit.{name}" for name in documented.public_names()}
    missing, told = {"flexkit.TopK", "flexkit.Trace.mask"}, []
    monkeypatch.setattr(documented.logger, "warning", lambda message, name: told.append(name))
    objects = SimpleNamespace(python_domain=SimpleNamespace(objects=dict.fromkeys(pages - missing)))
    documented.check_coverage(None, SimpleNamespace(domains=objects))
    assert sorted(told) == ["TopK", "Trace.mask"]


def test_api_pages_name_public_things_only() -> None:
    assert {name for _, name in TOP} >= NAMED
