"""High-res views that are one larger picture, for towers that take pictures or patches of any number."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexkit
from flexkit import FlexConfig
from flexkit.errors import HighResInputError
from flexkit.patching.registry import find_geometry
from tests.zoo import ZOO, Family, Row, low_res, prompt
from tests.zoo.discrete import DISCRETE
from tests.zoo.raw import RAW
from tests.zoo.sized import SIZED

CODES = {family.name for family in DISCRETE}
"""Models whose features are embedded codes, which may stay the same when a picture changes."""
ZOOM = (2, 1)

PICTURES = [family for family in (*SIZED, *RAW) if family.name in ZOO]

every_family = pytest.mark.parametrize("family", (*PICTURES, *DISCRETE), ids=lambda family: family.name)
any_size = pytest.mark.parametrize("family", (*PICTURES, ZOO["emu3"]), ids=lambda family: family.name)


def view(family: Family, zoom: tuple[int, int] = ZOOM, seed: int = 7) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    parts = family.views(family.config(), [family.grid], zoom)
    return {name: part.double() if part.is_floating_point() else part for name, part in parts.items()}


def features(model: Any, family: Family, inputs: dict[str, Tensor], zoom: tuple[int, int] = ZOOM) -> Tensor:
    (encoded,) = find_geometry(model).encode(model, inputs, [family.grid], zoom)
    return encoded


def keep_places_apart(model: Any) -> None:
    """Take away what carries information from place to place in the tower."""
    decoder: Any = find_geometry(model).decoder(model)
    kept = set(decoder.layers.modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if module in kept or not isinstance(weight, Tensor):
                continue
            mixing = ("o_proj", "o_proj.linear", "out_proj", "proj_out", "output.dense", "post_attention_layernorm")
            if "att" in name and name.endswith(mixing):
                weight.zero_()
            if isinstance(module, nn.Conv2d | nn.Conv3d) and weight.shape[-1] == 3:
                if module.stride[-1] == 1:
                    weight[..., [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
                else:  # a picture is halved: the third pixel is the next one's
                    weight[..., 2, :] = weight[..., :, 2] = 0


def cells_of_pixels(pixels: Tensor, rows: int, columns: int) -> Tensor:
    """The high-res cell of every pixel, or of every patch, in the form of ``pixel_values``."""
    cells = torch.arange(rows * columns).view(rows, columns)
    picture = pixels.ndim == 4 and pixels.shape[1] == 3
    patches = pixels.shape[1] if pixels.ndim == 3 else len(pixels)
    down, across = (
        (pixels.shape[2] // rows, pixels.shape[3] // columns) if picture else [math.isqrt(patches // cells.numel())] * 2
    )
    cells = cells.repeat_interleave(down, dim=0).repeat_interleave(across, dim=1)
    return (
        cells.expand_as(pixels) if picture else cells.flatten().view(-1, *[1] * (pixels.ndim - 1 - (pixels.ndim == 3)))
    )


@every_family
def test_features_lie_as_the_picture_does(family: Family) -> None:
    """Whatever a family shuffles: the pixels of a cell change the features of that cell most."""
    model = family.model()
    keep_places_apart(model)
    rows, columns = family.grid[0] * ZOOM[0], family.grid[1] * ZOOM[1]
    change = torch.zeros(rows * columns, rows * columns, dtype=torch.float64)
    for seed in range(12 if family.name in CODES else 1):
        inputs = view(family, seed=seed)
        before = features(model, family, inputs)
        assert len(before) == rows * columns
        cells = cells_of_pixels(inputs["pixel_values"], rows, columns)
        for cell in range(rows * columns):
            pixels = torch.where(cells == cell, -inputs["pixel_values"], inputs["pixel_values"])
            change[cell] += (features(model, family, inputs | {"pixel_values": pixels}) - before).norm(dim=-1)
    assert change.argmax(-1).tolist() == list(range(rows * columns))


@any_size
def test_a_picture_is_encoded_as_the_model_does(family: Family) -> None:
    """At zoom 1 the high-res features are what the model itself puts in the place of the cells."""
    model, inputs = family.model(), prompt(family, [Row()], zoom=(1, 1))
    geometry = find_geometry(model)
    shown = {name: inputs[f"hd_{name}"] for name in geometry.inputs}
    base = family.finish(model.config, shown, [1]) if family.finish else shown
    entered: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        entered.append(kwargs["inputs_embeds"])

    hook = geometry.decoder(model).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**low_res(inputs) | {name: value for name, value in base.items() if name in inputs})
    hook.remove()
    image_tokens = geometry.image_tokens(model, inputs["input_ids"], None)[0]
    cells = entered[0][0, image_tokens][geometry.layout(model, family.grid)]
    torch.testing.assert_close(features(model, family, shown, (1, 1)), cells)


@pytest.mark.parametrize("family", PICTURES, ids=lambda family: family.name)
def test_pictures_of_several_sizes(family: Family) -> None:
    """Each is encoded as if it were alone, whatever the padding."""
    model, grids = family.model(), [(2, 3), (3, 1), (1, 2)]
    geometry = find_geometry(model)
    together = prompt(family, [Row(tuple(grids))], zoom=ZOOM)
    inputs = {name: together[f"hd_{name}"] for name in geometry.inputs}
    assert geometry.grids(model, inputs, ZOOM) == grids
    encoded = geometry.encode(model, inputs, grids, ZOOM)
    for index, grid in enumerate(grids):
        alone = one_of(inputs, index, [rows * columns * ZOOM[0] * ZOOM[1] for rows, columns in grids])
        assert geometry.grids(model, alone, ZOOM) == [grid]
        (expected,) = geometry.encode(model, alone, [grid], ZOOM)
        torch.testing.assert_close(encoded[index], expected, rtol=1e-5, atol=1e-5)


def one_of(inputs: dict[str, Tensor], index: int, cells: list[int]) -> dict[str, Tensor]:
    """One of several pictures, without padding where its inputs show which that is."""
    alone = {}
    for name, value in inputs.items():
        if len(value) == len(cells):
            alone[name] = value[index : index + 1]
        else:
            each = len(value) // sum(cells)
            alone[name] = value.split([count * each for count in cells])[index]
    if "image_sizes" in alone and alone["pixel_values"].ndim == 4 and alone["pixel_values"].shape[1] == 3:
        height, width = alone["image_sizes"][0].tolist()
        alone["pixel_values"] = alone["pixel_values"][..., :height, :width]
    return alone


def refused(name: str, change: dict[str, Any], message: str) -> None:
    """A view of a family with inputs changed by functions."""
    if name not in ZOO:
        pytest.skip("this transformers has no such model type")
    family = ZOO[name]
    inputs = prompt(family, [Row()])
    model = flexkit.patch_model(family.model(), FlexConfig(zoom=2), trained=True)
    with pytest.raises(HighResInputError, match=message):
        model(**inputs | {key: function(inputs[key]) for key, function in change.items()})


@pytest.mark.parametrize("name", [name for name in ("mistral3", "fuyu", "lfm2_vl", "nemotron_h_omni") if name in ZOO])
def test_sizes_that_are_none(name: str) -> None:
    model = ZOO[name].model()
    size = f"hd_{find_geometry(model).size_input}"  # type: ignore[attr-defined]
    for wrong in (torch.Tensor.double, torch.zeros_like, torch.flatten, lambda sizes: sizes[:0]):
        refused(name, {size: wrong}, f"{size} is .*; expected positive integers, \\(rows, columns\\) each")


@pytest.mark.parametrize(
    ("name", "key"),
    [("mistral3", "image_sizes"), ("lfm2_vl", "spatial_shapes"), ("gemma4", "image_position_ids")],
)
def test_low_res_of_another_size(name: str, key: str) -> None:
    family = ZOO[name]
    inputs, other = prompt(family, [Row()]), prompt(family, [Row(((1, 3),))])
    model = flexkit.patch_model(family.model(), FlexConfig(zoom=2), trained=True)
    base = low_res(other) | {key: value for key, value in inputs.items() if key.startswith("hd_")}
    with pytest.raises(HighResInputError, match=rf"{key} gives low-res grids \[\(1, 3\)\]; .* zoom of \[\(2, 3\)\]"):
        model(**base)


@pytest.mark.parametrize(
    ("name", "key", "change", "message"),
    [
        ("mistral3", "hd_image_sizes", lambda sizes: sizes - 4, r"image of 28 x 44; expected rows divisible by 16"),
        ("mistral3", "hd_pixel_values", lambda pixels: pixels[..., :-1], r"\(1, channels, height, width\) that hold"),
        ("mistral3", "hd_pixel_values", lambda pixels: pixels[0], r"expected \(images, 3, height, width\)"),
        ("fuyu", "hd_pixel_values", lambda pixels: pixels[1:], r"asks for 24 patches of 4 pixels a side"),
        ("lfm2_vl", "hd_pixel_attention_mask", lambda mask: mask.tril(-1), r"\[\(8, 12\)\] asks for \[96\] patches"),
        ("lfm2_vl", "hd_pixel_values", lambda pixels: pixels[:, 1:], r"\[\(8, 12\)\] asks for \[96\] patches"),
        ("nemotron_h_omni", "hd_pixel_values", lambda pixels: pixels[1:], r"\[\(8, 12\)\] does not add up"),
        ("gemma4", "hd_image_position_ids", lambda places: places[:, 1:], r"expected \(images, patches, width\)"),
        ("gemma4", "hd_image_position_ids", lambda places: places.flip(1), r"96 patches in 8 rows and 12 columns"),
        ("gemma4", "hd_image_position_ids", lambda places: places.flip(-1), r"96 patches in 12 rows and 8 columns"),
        ("gemma4", "hd_image_position_ids", lambda places: places * 0 - 1, r"image of 0 patches"),
    ],
)
def test_views_that_contradict_their_sizes(name: str, key: str, change: Any, message: str) -> None:
    refused(name, {key: change}, message)


@pytest.mark.parametrize("name", ["mistral3", "gemma4", "emu3"])
def test_a_model_without_a_tower(name: str) -> None:
    """Some configs may lack what tells the size of a cell."""
    model = ZOO[name].model()
    part = "vq_config" if name == "emu3" else "vision_config"
    setattr(model.config, part, None)
    with pytest.raises(flexkit.errors.UnsupportedModelError, match=r"lacks `\w+`, which tells the size"):
        flexkit.patch_model(model)
