"""Unlimited-OCR: layers that see the prompt and a window of what was decoded since."""

from typing import Any

import pytest
import torch

import flexkit
from flexkit import FlexConfig
from flexkit.patching import get_patch
from tests.zoo import ZOO, Row, prompt


@pytest.mark.skipif("unlimited_ocr" not in ZOO, reason="this transformers has no Unlimited-OCR")
def test_the_map_stays_on_the_image_when_the_window_is_full() -> None:
    """Keys of decoded tokens are dropped, and those of the image in front of them stay where they are."""
    family = ZOO["unlimited_ocr"]
    model, inputs = family.model(), prompt(family, [Row()])
    model.set_attn_implementation("eager")
    flexkit.patch_model(model, FlexConfig(start_layer=3, zoom=2, policy=flexkit.TopK(3)), trained=True)
    patch, calls = get_patch(model), list[Any]()
    patch.recorders.append(calls.append)
    window = model.config.text_config.sliding_window
    output = model.generate(
        **inputs, max_new_tokens=window + 4, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    image_tokens = patch.geometry.image_tokens(model, inputs["input_ids"], None)[0].nonzero().flatten()
    cells = image_tokens[patch.geometry.layout(model, family.grid)]
    kept = [layers[2].shape[-1] for layers in output.attentions]
    assert kept[-1] == kept[-2] == inputs["input_ids"].shape[1] + window
    for call, layers in zip(calls, output.attentions, strict=True):
        expected = layers[2][0, :, -1, cells].sum(0).view(family.grid)
        (scores,) = call.selections[2].scores
        torch.testing.assert_close(scores[0, -1].to(expected.dtype), expected, rtol=1e-5, atol=1e-6)
