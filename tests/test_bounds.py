"""What pyproject.toml asks for at least is what `make test-oldest` runs with."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USED = [
    *PROJECT["dependencies"],
    *(line for extra in ("viz", "tiff", "video", "train") for line in PROJECT["optional-dependencies"][extra]),
]


def pinned() -> dict[str, Version]:
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): Version(next(iter(pin.specifier)).version) for pin in pins}


@pytest.mark.parametrize("line", [line for line in USED if not line.startswith("torch>")])
def test_the_lowest_version_is_the_one_that_is_tried(line: str) -> None:
    asked = Requirement(line)
    (lowest,) = [Version(each.version) for each in asked.specifier if each.operator == ">="]
    assert pinned()[canonicalize_name(asked.name)] == lowest
