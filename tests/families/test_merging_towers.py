"""LLaVA, and LLaVA-NeXT-Video, with a tower that merges patches between its stages."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import flexkit
from tests.zoo import IMAGE, VIDEO
from tests.zoo.tiny import TEXT

_TOWER: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1]}
TOWERS = {
    "swin": tf.SwinConfig(**_TOWER, num_heads=[2, 2], window_size=4),
    "focalnet": tf.FocalNetConfig(**_TOWER, hidden_sizes=[16, 32], use_conv_embed=True),
}


@pytest.fixture(params=TOWERS)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    vision = TOWERS[request.param]
    vision.hidden_size = 32  # which FocalNet calls otherwise
    last = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return {"text_config": tf.LlamaConfig(**TEXT), "vision_config": vision, **last}


@pytest.fixture
def model(settings: dict[str, Any]) -> Any:
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(image_token_id=IMAGE, **settings)).eval()


@torch.no_grad()
def test_tokens_are_those_of_the_last_stage(model: Any) -> None:
    inputs = {
        "input_ids": torch.tensor([[5, *[IMAGE] * 16, 6, 7]]),
        "pixel_values": torch.randn(1, 3, 32, 32),
    }
    view = torch.randn(1, 3, 64, 64)
    before = model(**inputs).logits
    flexkit.patch_model(model, flexkit.FlexConfig(start_layer=1, zoom=2, policy=first_cell), trained=True)
    assert torch.equal(model(**inputs).logits, before)
    with flexkit.trace(model) as trace:
        after = model(**inputs, hd_pixel_values=view).logits
    assert trace.scores(0, 0).shape == (1, 4, 4)
    assert trace.mask(0, 0).nonzero().tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert not torch.allclose(after[:, -1], before[:, -1], atol=1e-4)

    other = view.clone()
    other[..., 32:, :] += 1
    assert torch.equal(model(**inputs, hd_pixel_values=other).logits, after)
    other[..., :4, :4] += 1
    assert not torch.equal(model(**inputs, hd_pixel_values=other).logits, after)


@torch.no_grad()
def test_tokens_of_frames_are_pooled_from_those_of_the_last_stage(settings: dict[str, Any]) -> None:
    tokens = {"image_token_index": IMAGE, "video_token_index": VIDEO}
    config = tf.LlavaNextVideoConfig(spatial_pool_stride=2, **tokens, **settings)
    model = tf.LlavaNextVideoForConditionalGeneration(config).eval()
    inputs = {
        "input_ids": torch.tensor([[5, *[VIDEO] * 8, 6, 7]]),
        "pixel_values_videos": torch.randn(1, 2, 3, 32, 32),
    }
    view = torch.randn(1, 4, 3, 64, 64)
    before = model(**inputs).logits
    flexkit.patch_model(model, flexkit.FlexConfig(start_layer=1, zoom=(2, 2, 2), policy=first_cell), trained=True)
    assert torch.equal(model(**inputs).logits, before)
    with flexkit.trace(model) as trace:
        after = model(**inputs, hd_pixel_values_videos=view).logits
    assert trace.scores(0, 0).shape == (1, 2, 2, 2) and trace.mask(0, 0).shape == (1, 4, 4, 4)
    assert not torch.allclose(after[:, -1], before[:, -1], atol=1e-4)


def first_cell(scores: Tensor) -> Tensor:
    selected = torch.zeros_like(scores, dtype=torch.bool)
    selected[..., 0, 0] = True
    return selected
