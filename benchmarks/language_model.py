"""Prefill and decoded token of a language model: base, reading a tenth, and with all high-res tokens in the sequence.

python -m benchmarks.language_model --width 2048 --layers 12 --output benchmarks/results/mha-2048.json
python -m benchmarks.language_model --width 2048 --layers 12 --kv-heads 4 --output benchmarks/results/gqa-2048.json
"""

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch

import flexkit
from benchmarks.models import build_as, low_res, question
from benchmarks.report import benchmark_parser, facts, ratios, write
from benchmarks.ways import AskedTwice, Way, in_sequence
from flexkit.measuring import alternate, peak_bytes
from flexkit.selection import Policy, as_policy

WORDS = 64
ZOOM = 3


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every way in turns, and their ratios to the base model's."""
    base = build_as(options)
    inputs = question(base, WORDS, ZOOM)
    side = base.config.vision_config.image_size // base.config.vision_config.patch_size
    cells, read = side**2, round(options.selected * side**2)
    same, moving = steady(side, read), flexkit.TopK(read)
    patched = flexkit.patch_model(copy.deepcopy(base), flexkit.FlexConfig(zoom=ZOOM, policy=same), trained=True)
    ways = {
        "base": Way(base, low_res(inputs)),
        "flexkit": Way(patched, inputs, policy=same, projection="lazy"),
        "flexkit_moving": Way(patched, inputs, policy=moving, projection="lazy"),
        "recompute": Way(patched, inputs, policy=same, projection="recompute"),
    }
    # Of its own states the last prompt position selects for all of the answer, whatever later maps say.
    own = flexkit.FlexConfig.training_free(zoom=ZOOM, policy=moving, gate=None, surer=None)
    ways["own_states"] = Way(flexkit.patch_model(copy.deepcopy(base), own), inputs)
    ways["best_tile"] = AskedTwice(base, low_res(inputs))
    everything = Way(base, in_sequence(base, inputs, ZOOM, WORDS))
    for way in ways.values():
        way.prefill()
    found = {
        "prefill": alternate({name: way.prefill for name, way in ways.items()}, options.rounds),
        "decode": alternate({name: way.decode for name, way in ways.items()}, options.rounds * 10),
    }
    peak = {}
    for name, way in {**ways, "all_in_sequence": everything}.items():
        way.forget()
        peak[name] = peak_bytes(way.prefill, options.device) / 2**20
    longer = {"flexkit": ways["flexkit"], "all_in_sequence": everything}
    found["prefill_of_all"] = alternate({name: way.prefill for name, way in longer.items()}, options.long_rounds)
    found["decode_of_all"] = alternate({name: way.decode for name, way in longer.items()}, options.rounds * 4)
    return {
        **facts(base, options),
        "image_tokens": cells,
        "high_res_tokens": cells * ZOOM**2,
        "text_tokens": WORDS,
        "selected": read / cells,
        "peak_mib": peak,
        "seconds": found,
        "ratios": {
            "prefill": ratios(found["prefill"], "base"),
            "decode": ratios(found["decode"], "base"),
            "prefill_of_all": ratios(found["prefill_of_all"], "flexkit"),
            "decode_of_all": ratios(found["decode_of_all"], "flexkit"),
        },
    }


def steady(side: int, cells: int) -> Policy:
    """The best-scored cells, of scores to which more is added in the middle than any map has.

    The maps of random weights change wholly from token to token, and every token would read other cells.
    """
    added = 1e3 * flexkit.Center(cells)(torch.zeros(side, side)).float()
    best = flexkit.TopK(cells)
    return as_policy(lambda scores: best.mask(scores + added.to(scores.device)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one language model."""
    parser = benchmark_parser(__doc__, 2048)
    parser.add_argument(
        "--selected", type=float, default=0.1, help="share of the high-res tokens; default: %(default)s"
    )
    parser.add_argument("--long-rounds", type=int, default=1, help="of the prefill of all tokens")
    options = parser.parse_args(arguments)
    write(options.output, measure(options))


if __name__ == "__main__":
    main()
