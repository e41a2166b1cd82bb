"""Scripts that are in no package, as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name: str) -> ModuleType:
    """A fresh module of ``examples/name.py``."""
    return load_script(EXAMPLES / f"{name}.py")


def load_script(path: Path) -> ModuleType:
    """A fresh module of a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
