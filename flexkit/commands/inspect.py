"""``flexkit inspect``."""

import argparse
import json

from flexkit.commands.options import BYTES, COUNTS, OPERATIONS, Subparsers, add_debug, unit_for
from flexkit.commands.waiting import waiting

__all__ = ["add_inspect"]

_VIDEO_VIEWS = {
    "tiles": "tiles of frames, encoded when they are read",
    "frames": "frames, encoded when they are read",
    "whole": "all frames at once",
}


def add_inspect(commands: Subparsers) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "inspect",
        help="can a model be patched, how, and what does that add and save; without its weights",
        epilog="examples: flexkit inspect llava-hf/llava-1.5-7b-hf; flexkit inspect qwen2_5_vl; "
        "flexkit inspect ./my-model --json. Exit code 2: it cannot be patched, or there is no such model.",
    )
    parser.add_argument("model", help="a folder, a hub id, a model type, or a known name, such as llava-1.5-7b")
    parser.add_argument("--json", action="store_true", help="print nothing but an object")
    add_debug(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from flexkit.accounting.inspection import inspect_model

    with waiting(f"looking at {options.model}"):
        found = inspect_model(options.model)
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    first, last = found.reading_layers[0], found.reading_layers[-1]
    tokens = "as many as its size asks for" if found.image_tokens is None else str(found.image_tokens)
    view = "tiles, encoded when they are read" if found.view == "tiles" else "one larger image"
    videos = found.videos
    if found.video_view is not None:
        videos = f"in high resolution, {_VIDEO_VIEWS[found.video_view]} ({videos})"
    share = 100 * found.added_parameters / found.parameters
    print(f"{found.model} ({found.model_type}) can be patched.\n")
    if found.default_shapes:
        print(
            f"  Sizes are the defaults of transformers for {found.model_type}; give a folder or a hub id for those\n"
            "  of a model that somebody has trained.\n"
        )
    unit, one = unit_for(found.added_parameters, COUNTS)
    print(f"  low-res tokens of an image   {tokens}")
    print(f"  high-res view                zoom {found.zoom[0]} x {found.zoom[1]}, {view}")
    print(f"  videos                       {videos}")
    print(f"  reading layers               {first} to {last}, {len(found.reading_layers)} of {found.layers}")
    print(f"  added parameters             {found.added_parameters / one:.1f} {unit}, {share:.1f} % of the model's")
    unit, one = unit_for(found.training_free_bytes, BYTES)
    more = f"{found.training_free_bytes / one:.0f} {unit}"
    print(f"  without training             {more} more, by FlexConfig.training_free()")
    if found.costs:
        ways = ("flexkit_on_demand", "low_res", "all_in_sequence")
        ours, without, whole = (found.costs[name].flops for name in ways)
        unit, one = unit_for(without, OPERATIONS)
        print(
            f"  an answer                    {ours / one:.1f} {unit} reading a tenth, {without / one:.1f} without, "
            f"{whole / one:.1f} with all high-res tokens in the sequence"
        )
    print("\nAs FlexConfig.published() sets it up: the added parameters have to be trained, or loaded.")
