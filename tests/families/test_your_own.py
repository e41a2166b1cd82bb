"""A model that transformers does not know, patched as the page on families says."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexkit
from flexkit.patching import registry
from tests.scripts import load_example


@pytest.fixture
def script() -> Iterator[ModuleType]:
    yield load_example("own_family")
    registry._registered.pop("sketch", None)


@pytest.fixture
def sketch(script: ModuleType) -> Any:
    torch.manual_seed(0)
    model = script.Sketch(script.SketchConfig()).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    flexkit.register_geometry("sketch", script.SketchGeometry())
    return model


def inputs_of(script: ModuleType) -> dict[str, Tensor]:
    inputs = script.prompts()
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def test_a_model_of_your_own(script: ModuleType, sketch: Any) -> None:
    assert "sketch" in flexkit.supported_models()
    inputs = inputs_of(script)
    base = {name: value for name, value in inputs.items() if not name.startswith("hd_")}
    with torch.no_grad():
        expected = sketch(**base).logits
        flexkit.patch_model(sketch, flexkit.FlexConfig(policy=flexkit.Nothing()), trained=True)
        assert torch.equal(sketch(**inputs).logits, expected)
        flexkit.unpatch_model(sketch)
        flexkit.patch_model(sketch, flexkit.FlexConfig(policy=flexkit.TopK(3)), trained=True)
        assert not torch.equal(sketch(**inputs).logits, expected)
        together = sketch.generate(**inputs, max_new_tokens=4, do_sample=False)
        for row in range(2):
            alone = {name: value[row : row + 1] for name, value in inputs.items()}
            assert torch.equal(sketch.generate(**alone, max_new_tokens=4, do_sample=False)[0], together[row])
        flexkit.unpatch_model(sketch)
        assert torch.equal(sketch(**base).logits, expected)


def test_a_view_that_does_not_fit(script: ModuleType, sketch: Any) -> None:
    inputs = inputs_of(script)
    flexkit.patch_model(sketch, flexkit.FlexConfig(policy=flexkit.TopK(3)), trained=True)
    with pytest.raises(flexkit.HighResInputError, match="hd_sketch is to have 24 x 24 pixels"):
        sketch(**inputs | {"hd_sketch": inputs["sketch"]})


def corner(scores: Tensor) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[..., 0, 0] = True
    return mask


def test_a_tower_of_one_size(script: ModuleType, sketch: Any) -> None:
    inputs, found = inputs_of(script), []
    for geometry in (script.SketchGeometry(), script.TiledSketchGeometry()):
        flexkit.register_geometry("sketch", geometry)
        flexkit.patch_model(sketch, flexkit.FlexConfig(policy=corner), trained=True)
        with torch.no_grad(), flexkit.trace(sketch) as trace:
            found.append(sketch(**inputs).logits)
        flexkit.unpatch_model(sketch)
    assert trace.steps[0].tiles == 2
    torch.testing.assert_close(found[1], found[0])


MISTAKES = {
    "layout": (lambda self, model, grid: torch.ones(10).bool(), "layout marks 10 of 10 tokens as cells"),
    "cut": (
        lambda self, inputs, zoom: [(view[None],) for view in inputs["sketch"]],
        r"cut gave \[1\] tiles",
    ),
    "encode_tiles": (flexkit.Geometry.encode_tiles, "needs `encode_tiles` too"),
    "image_tokens": (flexkit.Geometry.image_tokens, "has no image_token_id; .* needs a method image_tokens"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_geometry_are_named(script: ModuleType, sketch: Any, name: str) -> None:
    method, told = MISTAKES[name]
    geometry = type("Mistaken", (script.TiledSketchGeometry,), {name: method})()
    flexkit.register_geometry("sketch", geometry)
    flexkit.patch_model(sketch, flexkit.FlexConfig(policy=flexkit.TopK(1)), trained=True)
    with pytest.raises((flexkit.FlexkitError, NotImplementedError), match=told):
        sketch(**inputs_of(script))


def test_the_script(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.main()
    assert capsys.readouterr().out.startswith("token 0: row 0 reads 12 of 36 tokens\n")


def test_before_it_is_registered(script: ModuleType) -> None:
    with pytest.raises(flexkit.UnsupportedModelError, match=r"'sketch'.*register_geometry adds one"):
        flexkit.patch_model(script.Sketch(script.SketchConfig()))
    with pytest.raises(flexkit.ConfigError, match=r"pass SketchGeometry\(\.\.\.\)"):
        flexkit.register_geometry("sketch", script.SketchGeometry)
    with pytest.raises(flexkit.ConfigError, match="must be an instance of flexkit"):
        flexkit.register_geometry("sketch", "sketch")  # type: ignore[arg-type]
    with pytest.raises(flexkit.ConfigError, match="must be a tuple of names"):
        flexkit.register_geometry("sketch", type("Wrong", (script.SketchGeometry,), {"inputs": "sketch"})())
