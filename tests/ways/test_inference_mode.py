"""A generation that begins in ``torch.inference_mode`` and goes on outside."""

import torch
import transformers as tf

import flexkit
from tests.patching.ways import assert_close, logits_of
from tests.ways.questions import question
from tests.zoo import ZOO


def test_tiles_are_opened_outside() -> None:
    """The second word looks at a tile that the first has not opened."""
    inputs = question("llava").inputs
    words = inputs["input_ids"].shape[1]

    def corner(scores: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[..., -1 if turn else 0, -1 if turn else 0] = True
        return mask

    model = flexkit.patch_model(ZOO["llava"].model(), flexkit.FlexConfig(policy=corner, zoom=2), trained=True)
    cache = tf.DynamicCache(config=model.config.get_text_config())
    turn = 0
    with torch.inference_mode():
        logits_of(model, inputs, past_key_values=cache)
    more = {"input_ids": inputs["input_ids"][:, -1:]}
    turn = 1
    outside = logits_of(model, more, past_key_values=cache)
    assert cache.get_seq_length() == words + 1

    turn, cache = 0, tf.DynamicCache(config=model.config.get_text_config())
    logits_of(model, inputs, past_key_values=cache)
    turn = 1
    assert_close(outside, logits_of(model, more, past_key_values=cache))
