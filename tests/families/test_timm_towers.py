"""Towers of timm: their configs say little of the pictures that they take."""

import pytest

import flexkit
from flexkit import FlexConfig, UnsupportedModelError
from flexkit.errors import HighResInputError
from tests.zoo import ZOO, Row, prompt


@pytest.mark.parametrize("name", ["fast_vlm", "gemma3n"])
def test_a_view_that_is_no_zoom_of_any_size(name: str) -> None:
    inputs = prompt(ZOO[name], [Row()])
    model = flexkit.patch_model(ZOO[name].model(), FlexConfig(zoom=2), trained=True)
    with pytest.raises(HighResInputError, match="hd_pixel_values has shape"):
        model(**inputs | {"hd_pixel_values": inputs["hd_pixel_values"][..., :-1]})


def test_a_picture_of_unknown_size() -> None:
    model = ZOO["perception_lm"].model()
    del model.config.vision_config.model_args["img_size"]
    with pytest.raises(UnsupportedModelError, match="image_size"):
        flexkit.patch_model(model)


def test_patches_of_unknown_size() -> None:
    model = ZOO["perception_lm"].model()
    model.config.vision_config.architecture = "vit_of_my_own"
    with pytest.raises(UnsupportedModelError, match="no square grid"):
        flexkit.patch_model(model)
