"""Whether every public name has a place in the API pages: a warning for each that has none, which fails the build."""

import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from sphinx.util import logging

import flexkit

logger = logging.getLogger(__name__)
METHODS = FunctionType, property, classmethod, staticmethod


def public_methods(thing: object) -> list[str]:
    """The public methods and properties that a class defines itself; of anything else, none."""
    own = vars(thing) if inspect.isclass(thing) else {}
    return [key for key, value in own.items() if isinstance(value, METHODS) and not key.startswith("_")]


def public_names() -> Iterator[str]:
    """The names of the package, and the public methods of its classes."""
    for name in flexkit.__all__:
        thing = getattr(flexkit, name)
        if name.startswith("__") or inspect.ismodule(thing):
            continue
        yield name
        yield from (f"{name}.{key}" for key in public_methods(thing))


def check_coverage(app: Any, env: Any) -> None:
    """Warn of public names that no page documents."""
    paths = [path.split(".") for path in env.domains.python_domain.objects]
    documented = {".".join(path[-length:]) for path in paths for length in (1, 2)}
    for name in public_names():
        if name not in documented:
            logger.warning("flexkit.%s is public, and no page documents it", name)
