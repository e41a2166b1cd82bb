"""A decoded token whose step is compiled: the base model's, and flexkit's with what it reads.

python -m benchmarks.compiled --width 2048 --layers 12 --output benchmarks/results/compiled-2048.json

With a static cache all high-res tokens are encoded and projected by the prompt; a token looks, gathers what it selects
and attends to that.
"""

import argparse
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

import flexkit
from benchmarks.language_model import WORDS, ZOOM
from benchmarks.models import build_as, low_res, question
from benchmarks.report import benchmark_parser, facts, ratios, write
from benchmarks.ways import wait
from flexkit.measuring import alternate

SHARE = 0.1
"""Of the cells, that each layer reads."""
_ROOM = 64
"""Tokens that the cache has room for behind the prompt."""


class Step:
    """A model whose step behind a prompt is compiled."""

    def __init__(self, model: Any, inputs: Mapping[str, Tensor]) -> None:
        self.model = model
        length = inputs["input_ids"].shape[1]
        self.cache = StaticCache(config=model.config.text_config, max_cache_len=length + _ROOM)
        with torch.no_grad():
            model(**inputs, past_key_values=self.cache, logits_to_keep=1)
        self.word = torch.full((1, 1), 5, device=model.device)
        self.forward = torch.compile(model.forward, fullgraph=True)

    @torch.no_grad()
    def __call__(self) -> None:
        """Run one more token."""
        self.forward(input_ids=self.word, past_key_values=self.cache, logits_to_keep=1)
        wait(self.model)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every way in turns, and their ratios to the base model's."""
    base = build_as(options)
    inputs = question(base, WORDS, ZOOM)
    config = flexkit.FlexConfig(zoom=ZOOM, policy=flexkit.TopK(SHARE))
    patched = flexkit.patch_model(copy.deepcopy(base), config, trained=True)
    own = flexkit.FlexConfig.training_free(zoom=ZOOM, gate=None, surer=None)
    steps = {
        "base": Step(base, low_res(inputs)),
        "top_k": Step(patched, inputs),
        "one_selection": Step(flexkit.patch_model(copy.deepcopy(base), own), inputs),
    }
    for step in steps.values():
        step()
        step()
    rounds = min(options.rounds * 4, _ROOM - 4)
    seconds = alternate(steps, rounds)
    return {**facts(base, options), "selected": SHARE, "seconds": seconds, "ratios": ratios(seconds, "base")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one language model."""
    options = benchmark_parser(__doc__, 2048).parse_args(arguments)
    write(options.output, measure(options))


if __name__ == "__main__":
    main()
