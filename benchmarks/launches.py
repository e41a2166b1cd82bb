"""What a prompt and a token ask of a GPU, by what they ask without a high-res view: kernels, bytes, waits of the host.

python -m benchmarks.launches --width 1024 --layers 6 --dtype bfloat16 --output benchmarks/results/launches-1024.json

They are counted, not timed, so that the numbers are the same on every machine.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import flexkit
from benchmarks.language_model import ZOOM, steady
from benchmarks.models import build_as, low_res, question
from benchmarks.report import benchmark_parser, facts, write
from benchmarks.ways import Way
from flexkit.measuring import count_launches

SHARE = 0.1
"""Of the cells, that each layer reads."""
CASES = ((64, 1), (64, 8), (4000, 1))
"""Words of a prompt, and prompts of a batch."""
_SETTLED = 2
"""Tokens before the one that is counted, which reads what they have read."""


def configs(side: int) -> dict[str, flexkit.FlexConfig]:
    """The settings that are counted, of a grid of so many cells a side."""
    always = flexkit.FlexConfig.training_free(zoom=ZOOM, gate=None, surer=None)
    return {
        "steady": flexkit.FlexConfig(zoom=ZOOM, policy=steady(side, round(SHARE * side**2))),
        "top_k": flexkit.FlexConfig(zoom=ZOOM, policy=flexkit.TopK(SHARE), projection="full"),
        "threshold": flexkit.FlexConfig(zoom=ZOOM),
        "one_selection": always,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """By case, way and part of an answer: what it asks for."""
    base = build_as(options)
    side = base.config.vision_config.image_size // base.config.vision_config.patch_size
    patched = {
        name: flexkit.patch_model(copy.deepcopy(base), config, trained=True) for name, config in configs(side).items()
    }
    found: dict[str, dict[str, Any]] = {}
    for words, batch in CASES:
        one = question(base, words, ZOOM)
        inputs = {name: value.repeat(batch, *[1] * (value.ndim - 1)) for name, value in one.items()}
        ways = {"base": Way(base, low_res(inputs)), **{name: Way(model, inputs) for name, model in patched.items()}}
        found[f"{words} words, batch of {batch}"] = {name: _counted(way) for name, way in ways.items()}
    return {**facts(base, options), "batch": [batch for _, batch in CASES], "read": SHARE, "launches": found}


def _counted(way: Way) -> dict[str, dict[str, int]]:
    prefill = count_launches(way.prefill)
    for _ in range(_SETTLED):
        way.decode()
    return {"prefill": asdict(prefill), "token": asdict(count_launches(way.decode))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Count what one language model launches."""
    parser = benchmark_parser(__doc__, 1024)
    options = parser.parse_args(arguments)
    write(options.output, measure(options))


if __name__ == "__main__":
    main()
