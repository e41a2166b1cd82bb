"""Every input of a high-res view is checked at one door, whatever the family."""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import flexkit
from flexkit import FlexConfig, HighResInputError
from flexkit.patching import get_patch
from flexkit.patching.call.inputs import checked_views
from flexkit.patching.geometry.any_size import AnySize
from tests.zoo import ZOO, Family, Row, low_res, prompt

every_family = pytest.mark.parametrize("family", ZOO.values(), ids=list(ZOO))

BROKEN: dict[str, Callable[[Tensor], Any]] = {
    "a list": Tensor.tolist,
    "an array": Tensor.numpy,
    "no axes": lambda value: value.new_zeros(()),
    "an axis more": lambda value: value[None],
    "no image": lambda value: value[:0],
    "an empty axis": lambda value: value[..., :0],
    "complex": lambda value: value.to(torch.complex64),
    "sparse": Tensor.to_sparse,
    "without values": lambda value: value.to("meta"),
    "of the other kind": lambda value: value.long() if value.is_floating_point() else value + 0.5,
}
FLOATING: dict[str, Callable[[Tensor], Any]] = {
    "float8": lambda value: value.to(torch.float8_e4m3fn),
    "bool": Tensor.bool,
    "NaN": lambda value: value.index_fill(0, torch.tensor([0]), torch.nan),
    "infinite": lambda value: value / 0,
    "half as wide": lambda value: value[..., : value.shape[-1] // 2],
}
INTEGERS: dict[str, Callable[[Tensor], Any]] = {
    "huge": lambda value: torch.full_like(value, 2**62),
    "larger by one": lambda value: value + 1,
}


@lru_cache(maxsize=1)
def without_weights(family: Family) -> Any:
    """A patched model that has no weights: inputs are checked before any are asked for."""
    with torch.device("meta"):
        model = family.model_class(family.config())
    return flexkit.patch_model(model, FlexConfig(zoom=2, start_layer=0, select_from="same"), trained=True)


def view(family: Family, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model = without_weights(family)
    high_res = {name: value for name, value in inputs.items() if name.startswith("hd_")}
    (found,) = checked_views(model, get_patch(model), high_res, low_res(inputs))
    return found.inputs


@every_family
def test_what_is_no_view_is_named(family: Family) -> None:
    inputs = prompt(family, [Row(), Row()])
    for name in (name for name in inputs if name.startswith("hd_")):
        ways = FLOATING if inputs[name].is_floating_point() else INTEGERS
        for way, broken in (BROKEN | ways).items():
            with pytest.raises(HighResInputError, match=name):
                view(family, inputs | {name: broken(inputs[name])})
                pytest.fail(f"{name} was taken that is {way}")


@every_family
def test_a_view_is_taken_in_the_dtype_of_the_base_models_own(family: Family) -> None:
    inputs = prompt(family, [Row(), Row()])
    halves = {
        name: value.half() if value.is_floating_point() else value.int()
        for name, value in inputs.items()
        if name.startswith("hd_") and value.dtype != torch.bool
    }
    for name, value in view(family, inputs | halves).items():
        assert value.dtype == inputs[f"hd_{name}"].dtype or "mask" in name
        wanted = halves[f"hd_{name}"].to(value.dtype)
        assert torch.equal(value, wanted)


@every_family
def test_zero_views_are_none(family: Family) -> None:
    inputs = prompt(family, [Row(), Row()])
    none = {name: value[:0] for name, value in inputs.items() if name.startswith("hd_")}
    with pytest.raises(HighResInputError, match="0 high-res views; leave hd_"):
        view(family, inputs | none)


_SIZED = "qwen2_5_vl video_llama_3 mistral3 emu3 lfm2_vl nemotron_h_omni gemma4 minicpmv4_6"
SIZED = [name for name in _SIZED.split() if name in ZOO]


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("broken", [lambda sizes: sizes * 0, lambda sizes: sizes + 1, lambda sizes: sizes + 2**62])
def test_an_input_of_the_base_model_is_called_by_its_name(name: str, broken: Callable[[Tensor], Tensor]) -> None:
    family = ZOO[name]
    geometry = get_patch(without_weights(family)).geometry
    assert isinstance(geometry, AnySize)
    inputs = prompt(family, [Row(), Row()])
    size = geometry.size_input
    with pytest.raises(HighResInputError, match=size) as raised:
        view(family, inputs | {size: broken(inputs[size])})
    assert "hd_" not in str(raised.value)


def test_patches_that_name_one_place_twice() -> None:
    inputs = prompt(ZOO["pix2struct"], [Row()])
    patches = inputs["hd_flattened_patches"].clone()
    for wrong in ([2.0, 1.0], [1.5, 1.0], [-1.0, 1.0], [1.0, 0.0]):
        patches[0, 0, :2] = torch.tensor(wrong)
        with pytest.raises(HighResInputError, match="expected one patch in each"):
            view(ZOO["pix2struct"], inputs | {"hd_flattened_patches": patches})
    base = inputs["flattened_patches"].clone()
    base[0, 0, :2] = torch.tensor([2.0, 1.0])
    with pytest.raises(HighResInputError, match=r"^flattened_patches has an image"):
        view(ZOO["pix2struct"], inputs | {"flattened_patches": base})


BESIDE_AND_WITHIN = pytest.mark.parametrize("name", ["llava", "mllama", "pix2struct"])

QUERIES = {
    "list": ([[True]], "must be a bool tensor .*got list"),
    "array": (torch.ones(2, 3).numpy(), "must be a bool tensor .*got ndarray"),
    "number": (1, "must be a bool tensor .*got int"),
    "no axes": (torch.tensor(True), "must be a bool tensor"),
    "one axis": (torch.ones(3, dtype=torch.bool), "must be a bool tensor"),
    "three axes": (torch.ones(2, 3, 1, dtype=torch.bool), "must be a bool tensor"),
    "without values": (torch.ones(2, 3, dtype=torch.bool, device="meta"), "must be a bool tensor .*on meta"),
    "floats": (torch.ones(2, 3), "hd_queries are torch.float32"),
    "integers": (torch.ones(2, 3).long(), "hd_queries are torch.int64"),
    "no rows": (torch.ones(0, 3, dtype=torch.bool), r"shape \(0, 3\); expected torch.bool of shape \(2, "),
    "three rows": (torch.ones(3, 3, dtype=torch.bool), r"shape \(3, 3\); expected torch.bool of shape \(2, "),
    "too long": (torch.ones(2, 900, dtype=torch.bool), r"or shorter"),
}

OTHERS = {
    "hd_unknown": [[1], "x", 1, torch.ones(2, 9)],
    "hd_image_sizes": [[[30, 30]] * 2, torch.full((2, 2), 30).numpy(), torch.full((2, 2), 30, device="meta"), 3, "x"],
}


@lru_cache(maxsize=1)
def built(name: str) -> tuple[Any, dict[str, Tensor]]:
    return flexkit.patch_model(ZOO[name].model(), FlexConfig(zoom=2), trained=True), prompt(ZOO[name], [Row(), Row()])


def refused(name: str, message: str, **changes: Any) -> None:
    model, inputs = built(name)
    with pytest.raises(HighResInputError, match=message):
        model(**inputs | changes)


@BESIDE_AND_WITHIN
def test_queries_that_are_none(name: str) -> None:
    for queries, message in QUERIES.values():
        refused(name, message, hd_queries=queries)


@BESIDE_AND_WITHIN
def test_what_no_call_takes(name: str) -> None:
    for key, values in OTHERS.items():
        for value in values:
            refused(name, re.escape(key) if key != "hd_image_sizes" else "image.sizes", **{key: value})


@BESIDE_AND_WITHIN
def test_tiles_that_are_none(name: str) -> None:
    for junk in ([1, 2], 3, "x", torch.zeros(2), {}, torch.zeros(3).numpy()):
        refused(name, "hd_tiles", hd_tiles=junk)
    refused(name, "hd_tiles|0 high-res views", hd_tiles=[])


def test_sizes_beside_tiles_are_checked_too() -> None:
    refused("llava", r"must be tensors, not hd_image_sizes \(list\)", hd_tiles=[], hd_image_sizes=[[30, 30]])
