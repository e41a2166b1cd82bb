"""Questions to models whose attention reads the image from a context beside the decoder's sequence."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.patching.ways import generate, logits_of
from tests.versions import counts_positions_once, marked
from tests.ways.questions import TOKENS, Question, patched_model
from tests.zoo import CONTEXT, low_res, prompt

BLOCKS = {
    "mllama": "model.language_model.layers",
    "idefics": "model.gated_cross_attn_layers",
    "git": "git.encoder.layer",
    "blip": "text_decoder.bert.encoder.layer",
    "florence2": "model.language_model.decoder.layers",
    "vision-encoder-decoder": "decoder.bert.encoder.layer",
    "vision-encoder-decoder-gpt2": "decoder.transformer.h",
    "blip-2": "qformer.encoder.layer",
    "idefics2": "model.connector.perceiver_resampler.layers",
    "kosmos-2": "image_to_text_projection",
    "aria": "model.multi_modal_projector",
}
"""Models that differ in who reads, how the call gets there and whose attention it is, and the part that reads."""
each = pytest.mark.parametrize("name", BLOCKS)
each_that_decodes = pytest.mark.parametrize("name", marked(BLOCKS, git=counts_positions_once))
"""The same, where one call over all positions says what decoding should."""
LEARNED = [name for name in BLOCKS if CONTEXT[name].learned_queries]
READING_WORDS = [name for name in BLOCKS if name not in LEARNED]


@cache
def question(name: str) -> Question:
    """One prompt, what a patched model says to it and what it says without the high-res view."""
    inputs, model = prompt(CONTEXT[name]), patched_model(name)
    answer, base = (said(model, given) for given in (inputs, low_res(inputs)))
    return Question(inputs, answer, base)


def said(model: Any, inputs: dict[str, Tensor], tokens: int = TOKENS, **settings: Any) -> Any:
    """What a model generates; some models write into the prompt that they are given."""
    return generate(model, {key: value.clone() for key, value in inputs.items()}, tokens, **settings)


def longer(name: str, inputs: dict[str, Tensor], words: Tensor) -> dict[str, Tensor]:
    """A prompt and the words ``(length,)`` behind it."""
    stream, count = CONTEXT[name].stream, len(words)
    whole = dict(inputs)
    for key, value in inputs.items():
        if key == stream + "input_ids":
            whole[key] = torch.cat([value, words[None]], dim=1)
        elif key in (stream + "attention_mask", "cross_attention_mask", "image_attention_mask"):
            whole[key] = torch.cat([value, *[value[:, -1:]] * count], dim=1)  # a word sees what the last one sees
        elif key == "image_embeds_position_mask":
            whole[key] = nn.functional.pad(value, (0, count))
    return whole


def forced_logits(name: str, model: Any, inputs: dict[str, Tensor], written: Tensor) -> Tensor:
    """``(steps, vocabulary)``: from one call over prompt and answer, without a cache."""
    stream = CONTEXT[name].stream
    if name == "blip":  # takes the first token for the start and the last for the end of a text
        ids = torch.cat([torch.ones_like(inputs["input_ids"][:, :1]), inputs["input_ids"][:, 1:-1]], dim=1)
        inputs = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    start = inputs[stream + "input_ids"].shape[1]
    whole = longer(name, inputs, written[:-1])
    if name not in LEARNED and any(key.startswith("hd_") for key in inputs):
        whole["hd_queries"] = torch.arange(start)[None] == start - 1
    return logits_of(model, whole, use_cache=False)[0, -len(written) :]
