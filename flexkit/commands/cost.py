"""``flexkit cost``."""

import argparse
import json

import flexkit
from flexkit.commands.options import BYTES, OPERATIONS, Subparsers, add_debug, share, unit_for, whole
from flexkit.commands.waiting import waiting

__all__ = ["add_cost"]

_LEGEND = """
low_res: the base model. high_res: the base model with a tower for the high-res view. flexkit: all tiles are encoded;
flexkit_on_demand, as patched models do it: those that are looked at. flexkit_full: keys and values of all tokens.
recompute: anew at every step, as published. own_states: without training, one selection for an answer. best_tile: the
low-res view, then one part in its place. all_in_sequence: all tokens of both views in the prompt. read: high-res
tokens, by each layer. K, V: kept from token to token, high-res ones too."""
_PIXELS = whole(1, 10**6)
_TOKENS = whole(0, 10**6)


def add_cost(commands: Subparsers) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "cost",
        help="count what an answer about a picture or a video costs, for a model of any size, without its weights",
        epilog="examples: flexkit cost llava-1.5-7b --image-size 1008 --selected 0.1; "
        "flexkit cost qwen2.5-vl-7b --frames 16 --zoom 2 3 3 --low-res-size 336",
    )
    parser.add_argument("model", help="a folder, a hub id, or a known name, such as llava-1.5-7b or qwen2.5-vl-7b")
    parser.add_argument("--image-size", type=_PIXELS, metavar="PX", help="side of the high-res view")
    parser.add_argument("--low-res-size", type=_PIXELS, metavar="PX", help="default: what the tower was made for")
    parser.add_argument(
        "--zoom",
        type=whole(1, 64),
        nargs="+",
        metavar="N",
        help="the high-res view over the low-res view: along both sides; or along frames of a video, rows and columns; "
        "default: the patch's",
    )
    parser.add_argument("--frames", type=whole(1, 10**6), metavar="N", help="of a video, those in the sequence")
    parser.add_argument("--prompt", type=_TOKENS, default=60, metavar="N", help="text tokens; default: %(default)s")
    parser.add_argument("--new-tokens", type=_TOKENS, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--selected", type=share, default=0.1, metavar="SHARE", help="of the high-res tokens; default: %(default)s"
    )
    parser.add_argument("--tiles", type=_TOKENS, metavar="N", help="tiles, or frames, that they lie in")
    parser.add_argument("--start-layer", type=_TOKENS, metavar="L", help="the first that reads; default: the patch's")
    parser.add_argument("--json", action="store_true", help="print nothing but an object by way of reading")
    add_debug(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    zoom = options.zoom and (tuple(options.zoom) if len(options.zoom) > 1 else options.zoom[0])
    with waiting(f"counting {options.model}"):
        costs = flexkit.cost(
            options.model,
            options.image_size,
            frames=options.frames,
            prompt=options.prompt,
            new_tokens=options.new_tokens,
            selected=options.selected,
            tiles=options.tiles,
            low_res_size=options.low_res_size,
            config=flexkit.FlexConfig(start_layer=options.start_layer, zoom=zoom),
        )
    if options.json:
        print(json.dumps({name: cost.to_dict() for name, cost in costs.items()}, indent=2))
        return
    base = costs["low_res"]
    operations, flop = unit_for(base.flops, OPERATIONS)
    size, kept = unit_for(base.kv_bytes, BYTES)
    print(options.model)
    print(f"{'':<20}{operations:>10}{'of these, vision':>18}{'image tokens':>14}{'read':>8}{f'K, V {size}':>10}")
    for name, cost in costs.items():
        print(
            f"  {name:<18}{cost.flops / flop:>10.2f}{cost.vision_flops / flop:>18.2f}{cost.image_tokens:>14}"
            f"{cost.read_tokens:>8}{cost.kv_bytes / kept:>10.0f}"
        )
    print(_LEGEND)
