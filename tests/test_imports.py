"""What `import flexkit` brings along."""

import subprocess
import sys
import warnings

import pytest

import flexkit
import flexkit.attention
import flexkit.patching.geometry
from flexkit.attention import RaggedIndex
from flexkit.patching import registry

APART = ("flexkit.visual_search", "flexkit.demo", "flexkit.commands", "flexkit.training")


def test_scenes_weights_and_demo_stay_apart() -> None:
    code = "import sys, flexkit; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    own = [name for name in imported if name.startswith(APART)]
    assert "flexkit.patching" in imported and own == []


@pytest.mark.parametrize(
    ("place", "name", "now"),
    [
        (flexkit.attention, "QueryRows", RaggedIndex),
        (flexkit.patching.geometry, "find_geometry", registry.find_geometry),
        (flexkit.patching.geometry, "register_geometry", registry.register_geometry),
        (flexkit.patching.geometry, "supported_models", registry.supported_models),
    ],
)
def test_old_names_warn(place: object, name: str, now: object) -> None:
    with pytest.warns(DeprecationWarning, match=name):
        assert getattr(place, name) is now


@pytest.mark.parametrize("place", [flexkit.attention, flexkit.patching.geometry], ids=["attention", "geometry"])
def test_there_are_no_others(place: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hasattr(place, "nothing_of_that_name")
