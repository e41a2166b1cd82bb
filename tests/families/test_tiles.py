"""High-res views that are cut into tiles, for towers of one input size."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexkit
from flexkit import FlexConfig
from flexkit.errors import HighResInputError
from flexkit.patching.families import FAMILIES
from flexkit.patching.geometry import FixedGrid, find_geometry
from flexkit.patching.geometry.fixed_grid import AnyRes
from tests.zoo import ZOO, Family, Row, low_res, prompt

ZOOM = (2, 3)
UNEVEN = {"chameleon", "molmo2"}
"""Codes that may stay the same when a picture changes; cells at the border that hold fewer patches."""
DEEPER = {"granite4_vision", "granite_docling"}
"""Features of later layers of the tower join the image tokens on their way through the decoder."""


def tiled(excluded: set[str]) -> Any:
    """The families with a fixed grid but for some."""
    names = [name for name in ZOO if type(FAMILIES.get(name)) in (FixedGrid, AnyRes) and name not in excluded]
    return pytest.mark.parametrize("family", [ZOO[name] for name in names], ids=names)


def view(family: Family, zoom: tuple[int, int]) -> Tensor:
    torch.manual_seed(7)
    return family.views(family.config(), [family.grid], zoom)["pixel_values"].double()


def features(model: Any, family: Family, pixels: Tensor, zoom: tuple[int, int]) -> Tensor:
    (encoded,) = find_geometry(model).encode(model, {"pixel_values": pixels}, [family.grid], zoom)
    return encoded


def keep_places_apart(model: Any) -> None:
    """Weaken what carries information from place to place in the tower: attention, convolutions that overlap."""
    decoder = set(find_geometry(model).decoder(model).modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            if module in decoder:
                continue
            if "att" in name and name.split(".")[-1] in ("o_proj", "out_proj", "proj", "projection_layer"):
                module.weight.mul_(1e-4)
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                centre = module.weight[..., 1, 1].clone()
                module.weight.mul_(1e-2)[..., 1, 1] = centre


@tiled(UNEVEN)
def test_features_lie_as_the_picture_does(family: Family) -> None:
    """Whatever a family shuffles: the pixels of a cell change the features of that cell most."""
    model = family.model()
    keep_places_apart(model)
    pixels = view(family, ZOOM)
    rows, columns = family.grid[0] * ZOOM[0], family.grid[1] * ZOOM[1]
    height, width = pixels.shape[-2] // rows, pixels.shape[-1] // columns
    before = features(model, family, pixels, ZOOM)
    assert len(before) == rows * columns
    for cell in range(rows * columns):
        top, left = cell // columns * height, cell % columns * width
        changed = pixels.clone()
        changed[..., top : top + height, left : left + width] *= -1
        change = (features(model, family, changed, ZOOM) - before).norm(dim=-1)
        assert int(change.argmax()) == cell


@tiled(UNEVEN | DEEPER)
def test_a_tile_is_encoded_as_an_overview(family: Family) -> None:
    """At zoom 1 the high-res features are what the model itself puts in the place of the cells."""
    model, inputs = family.model(), prompt(family, [Row()], zoom=(1, 1))
    geometry = find_geometry(model)
    shown = next(name for name in inputs if name.startswith("pixel_values"))
    inputs[shown] = inputs["hd_pixel_values"].reshape(inputs[shown].shape)
    entered: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        entered.append(kwargs["inputs_embeds"])

    hook = geometry.decoder(model).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**low_res(inputs))
    hook.remove()
    image_tokens = geometry.image_tokens(model, inputs["input_ids"], None)[0]
    cells = entered[0][0, image_tokens][geometry.layout(model, family.grid)]
    torch.testing.assert_close(features(model, family, inputs["hd_pixel_values"], (1, 1)), cells)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_a_tile_of_zeros_is_a_picture(name: str) -> None:
    """These models drop such images; a padded view may hold some."""
    family = ZOO[name]
    model, pixels = family.model(), view(family, (1, 2))
    pixels[..., pixels.shape[-1] // 2 :] = 0
    nearly = pixels + 1e-12 * (pixels == 0)
    torch.testing.assert_close(features(model, family, pixels, (1, 2)), features(model, family, nearly, (1, 2)))


@pytest.mark.parametrize("name", ["llava_next", "llava_next_video", "llava_onevision", "granite4_vision"])
def test_overviews_whatever_tiles_the_model_would_cut(name: str) -> None:
    """A patched model takes prompts with overviews only, and encodes tiles of the view as overviews."""
    family = ZOO[name]
    inputs = prompt(family, [Row(), Row((None, None), 2)])
    model = flexkit.patch_model(family.model(), FlexConfig(zoom=2, policy=flexkit.TopK(3)), trained=True)

    def answers() -> list[Tensor]:
        with torch.no_grad():
            return [model(**inputs).logits, model.generate(**inputs, max_new_tokens=3, do_sample=False)]

    expected = answers()
    side = inputs["hd_pixel_values"].shape[-1] // 2
    model.config.image_grid_pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    assert all(map(torch.equal, answers(), expected))
    flexkit.unpatch_model(model)
    assert "get_image_features" not in vars(model.model)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("internvl", "crop_to_patches=False"),
        ("idefics3", "do_image_splitting=False"),
        ("gemma3", "do_pan_and_scan=False"),
        ("llava_next", r"pixel_values\[:, :1\]"),
    ],
)
def test_tiles_of_the_model_itself(name: str, remedy: str) -> None:
    """A prompt that carries them too is refused, and how to get another is said."""
    family = ZOO[name]
    inputs = prompt(family, [Row((None, None))])
    model = flexkit.patch_model(family.model(), FlexConfig(zoom=2), trained=True)
    with pytest.raises(HighResInputError, match=f"overviews only: .*{remedy}"):
        model(**inputs | {"hd_pixel_values": inputs["hd_pixel_values"][:1]})
