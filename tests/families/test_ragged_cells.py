"""Molmo2: five patches a side make three cells, of which those at the border hold fewer patches."""

import pytest
import torch

from flexkit.patching.registry import find_geometry
from tests.zoo import ZOO


@pytest.mark.skipif("molmo2" not in ZOO, reason="this transformers has no Molmo2")
def test_features_lie_as_the_picture_does() -> None:
    family, zoom = ZOO["molmo2"], (2, 1)
    model = family.model()
    with torch.no_grad():
        for name, parameter in model.model.vision_tower.named_parameters():
            if "o_proj" in name:
                parameter.mul_(1e-4)
    geometry, side = find_geometry(model), model.config.vision_config.patch_size
    torch.manual_seed(7)
    pixels = family.views(model.config, [family.grid], zoom)["pixel_values"].double()
    (before,) = geometry.encode(model, {"pixel_values": pixels}, [family.grid], zoom)
    edges = [(0, 2), (2, 4), (4, 5), (5, 7), (7, 9), (9, 10)]  # in patches; a tile has five
    cells = [(rows, columns) for rows in edges for columns in edges[:3]]
    assert len(before) == len(cells)
    for cell, ((top, bottom), (left, right)) in enumerate(cells):
        changed = pixels.clone()
        changed[..., top * side : bottom * side, left * side : right * side] *= -1
        (after,) = geometry.encode(model, {"pixel_values": changed}, [family.grid], zoom)
        assert int((after - before).norm(dim=-1).argmax()) == cell
