"""How prefill and decoded token grow with the picture, and with how much of it is read.

python -m benchmarks.growth --width 512 --layers 12 --output benchmarks/results/growth-512.json
"""

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

import flexkit
from benchmarks.models import NoiseTiles, build_as, low_res, question
from benchmarks.report import benchmark_parser, facts, ratios, write
from benchmarks.ways import Way, in_sequence
from flexkit.measuring import alternate, count_flops, kept_bytes
from flexkit.patching.memory import cached_memory

WORDS, ZOOM, TENTH = 64, 3, 0.1
ZOOMS = (2, 3, 6, 9, 27, 30)
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
VISION = ("vision_tower", "multi_modal_projector")


@torch.no_grad()
def cost_of(way: Way) -> dict[str, Any]:
    """What the language model computes in the prefill, and what is kept behind it."""
    flops = count_flops(way.prefill, without=VISION)
    memory = cached_memory(way.cache)
    tiles = memory.features.opened if memory else 0
    return {"lm_gflops": flops / 1e9, "kept_mib": kept_bytes(way.cache) / 2**20, "tiles": tiles}


def measured(ways: dict[str, Way], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """For each way its cost, and its seconds by those of the first in the same round."""
    costs = {name: cost_of(way) for name, way in ways.items()}
    first = next(iter(ways))
    prefill = ratios(alternate({name: way.prefill for name, way in ways.items()}, options.rounds), first)
    decode = ratios(alternate({name: way.decode for name, way in ways.items()}, 4 * options.rounds), first)
    return {name: costs[name] | {"prefill": prefill[name], "decode": decode[name]} for name in ways}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both growths, by the base model."""
    base = build_as(options)
    side = base.config.vision_config.image_size
    inputs = question(base, WORDS, ZOOM)
    small = low_res(inputs)
    cells = (side // base.config.vision_config.patch_size) ** 2
    patched = flexkit.patch_model(copy.deepcopy(base), flexkit.FlexConfig(zoom=ZOOM), trained=True)
    budget = round(TENTH * cells * ZOOM**2)
    sizes = {f"{side}": Way(base, small)}
    for zoom in ZOOMS:
        tiles = {"hd_tiles": [NoiseTiles(side, zoom)]}
        settings = {"zoom": zoom, "levels": 1, "budget": budget, "policy": flexkit.TopK(round(TENTH * cells))}
        sizes[f"{zoom * side}"] = Way(patched, {**small, **tiles}, **settings)
    levels = {"hd_tiles": [NoiseTiles(side, ZOOM, 3)]}
    third = {"zoom": ZOOM, "levels": 3, "budget": None, "policy": flexkit.TopK(round(TENTH * cells / 3))}
    sizes[f"{ZOOM**3 * side}, three levels"] = Way(patched, {**small, **levels}, **third)
    fractions = {"base": Way(base, small)}
    for fraction in FRACTIONS:
        settings = {
            "zoom": ZOOM,
            "levels": 1,
            "budget": None,
            "policy": flexkit.TopK(max(1, round(fraction * cells))),
            "tiles": "all",
        }
        fractions[f"{fraction:g}"] = Way(patched, inputs, **settings)
    by_size = measured(sizes, options)
    for way in sizes.values():
        way.cache = DynamicCache()
    by_fraction = measured(fractions, options)
    whole = Way(base, in_sequence(base, inputs, ZOOM, WORDS))
    return {
        **facts(base, options),
        "image_tokens": cells,
        "text_tokens": WORDS,
        "read_tokens": budget,
        "by_size": by_size,
        "by_fraction": by_fraction,
        "all_in_sequence": {f"{ZOOM * side}": measured({"base": Way(base, small), "all": whole}, options)["all"]},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one language model."""
    options = benchmark_parser(__doc__, 512).parse_args(arguments)
    write(options.output, measure(options))


if __name__ == "__main__":
    main()
