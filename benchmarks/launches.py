"""What a prompt and a token ask of a GPU, by what they ask without a high-res view: kernels, bytes, waits of the host.

python -m benchmarks.launches --width 1024 --layers 6 --dtype bfloat16 --family llava --output launches-llava.json

They are counted, not timed, so that the numbers are the same on every machine.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import flexkit
from benchmarks.families import FAMILIES
from benchmarks.language_model import ZOOM, steady
from benchmarks.models import low_res
from benchmarks.report import benchmark_parser, facts, write
from benchmarks.ways import Way
from flexkit.measuring import count_launches

SHARE = 0.1
"""Of the cells, that each layer reads."""
CASES = ((64, 1), (64, 8), (64, 32), (4000, 1))
"""Words of a prompt, and prompts of a batch."""
ANSWER = 200
"""Tokens of a long answer, to the first of the cases."""
_SETTLED = 2
"""Tokens before the one that is counted, which reads what they have read."""


def configs(side: int, *, is_in_sequence: bool) -> dict[str, flexkit.FlexConfig]:
    """The settings that are counted, of a grid of so many cells a side."""
    found = {
        "steady": flexkit.FlexConfig(zoom=ZOOM, policy=steady(side, round(SHARE * side**2))),
        "top_k": flexkit.FlexConfig(zoom=ZOOM, policy=flexkit.TopK(SHARE), projection="full"),
        "threshold": flexkit.FlexConfig(zoom=ZOOM),
    }
    if is_in_sequence:  # tokens pass through the layers there
        found["one_selection"] = flexkit.FlexConfig.training_free(zoom=ZOOM, gate=None, surer=None)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """By case, way and part of an answer: what it asks for."""
    family = FAMILIES[options.family]
    base = family.build(options)
    patched = {
        name: flexkit.patch_model(copy.deepcopy(base), config, trained=True)
        for name, config in configs(family.side, is_in_sequence=family.is_in_sequence).items()
    }
    found: dict[str, dict[str, Any]] = {}
    cases = [case for case in CASES if case[1] <= options.largest_batch]
    for number, (words, batch) in enumerate(cases):
        inputs = family.question(base, words, ZOOM, batch)
        ways = {"base": Way(base, low_res(inputs)), **{name: Way(model, inputs) for name, model in patched.items()}}
        answer = 0 if number else ANSWER
        found[f"{words} words, batch of {batch}"] = {name: _counted(way, answer) for name, way in ways.items()}
    batches = [batch for _, batch in cases]
    return {**facts(base, options), "family": options.family, "batch": batches, "read": SHARE, "launches": found}


def _counted(way: Way, answer: int) -> dict[str, dict[str, int]]:
    found = {"prefill": count_launches(way.prefill)}
    for _ in range(_SETTLED):
        way.decode()
    found["token"] = count_launches(way.decode)
    if answer:
        found["answer"] = count_launches(lambda: [way.decode() for _ in range(answer)])
    return {part: asdict(launches) for part, launches in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Count what one language model launches."""
    parser = benchmark_parser(__doc__, 1024)
    parser.add_argument("--family", choices=FAMILIES, default="llava", help="default: %(default)s")
    parser.add_argument("--largest-batch", type=int, default=32, help="in bfloat16 a CPU takes long; default: 32")
    options = parser.parse_args(arguments)
    write(options.output, measure(options))


if __name__ == "__main__":
    main()
