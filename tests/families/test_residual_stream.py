"""High-res features are in the space of the decoder layers: they carry what an image token has carried in the end."""

from typing import Any

import pytest
import torch
from einops import reduce
from torch import Tensor, nn

from flexkit.patching.registry import find_geometry
from tests.zoo import ZOO, Family, Row, low_res, prompt

KINDS = (
    "granite_docling",
    "granite4_vision",
    "molmo2",
    "llama4",
    "qwen3_vl",
    "qwen3_omni_moe_thinker",
    "cohere_compass",
)


def at_the_end(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What enters the last norm of the text model."""
    entered: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        entered.append(args[0])

    hook = find_geometry(model).decoder(model).get_submodule("norm").register_forward_pre_hook(keep)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return entered[0]


@pytest.mark.parametrize("family", [ZOO[name] for name in KINDS if name in ZOO], ids=lambda family: family.name)
def test_features_of_silent_layers(family: Family) -> None:
    """Layers that add nothing leave the image tokens as they came in, with the features that join them on the way."""
    model, inputs = family.model(), prompt(family, [Row()], zoom=(1, 1))
    geometry = find_geometry(model)
    with torch.no_grad():
        for name, parameter in geometry.decoder(model).named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    base = low_res(inputs)
    if family.finish is None or family.video is not None:  # those add what is said of videos
        for name in geometry.inputs:
            base[name] = inputs[f"hd_{name}"].reshape(base[name].shape)
    else:
        words = {name: base[name] for name in base if not name.startswith(("pixel", "image"))}
        base = family.finish(model.config, words | {"pixel_values": inputs["hd_pixel_values"]}, [1])
    views = {name: inputs[f"hd_{name}"] for name in geometry.inputs}
    (parts,) = geometry.encode(model, views, [family.grid], (1, 1))
    features = reduce(parts, "n (parts dim) -> n dim", "sum", dim=model.get_input_embeddings().embedding_dim)
    image_tokens = geometry.image_tokens(model, base["input_ids"], None)[0]
    carried = at_the_end(model, base)[0, image_tokens][geometry.layout(model, family.grid)]
    torch.testing.assert_close(carried, features, rtol=1e-6, atol=1e-6)
