"""Prefill and decoded token of a language model: base, reading a tenth, and with all high-res tokens in the sequence.

python -m benchmarks.language_model --width 2048 --layers 12 --output benchmarks/results/mha-2048.json
python -m benchmarks.language_model --width 2048 --layers 12 --kv-heads 4 --output benchmarks/results/gqa-2048.json
"""

import argparse
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import flexkit
from benchmarks.models import build, question
from benchmarks.report import add_common, facts, ratios, write
from flexkit.encoding import split_tiles
from flexkit.measuring import alternate
from flexkit.patching import get_patch

WORDS = 64
ZOOM = 3


class Way:
    """A model and the inputs of its prompt; a patched one with the settings that this way has."""

    def __init__(self, model: Any, inputs: Mapping[str, Tensor], **settings: Any) -> None:
        self.model, self.inputs, self.settings = model, inputs, settings
        self.cache = DynamicCache()

    def _settle(self) -> None:
        if self.settings:
            patch = get_patch(self.model)
            patch.config = patch.config.replace(**self.settings)

    @torch.no_grad()
    def prefill(self) -> None:
        """Run the prompt, and keep what the next tokens need."""
        self._settle()
        self.cache = DynamicCache(config=self.model.config.text_config)
        self.model(**self.inputs, past_key_values=self.cache, logits_to_keep=1)
        _wait(self.model)

    @torch.no_grad()
    def decode(self) -> None:
        """Run one more token."""
        self._settle()
        token = torch.full((1, 1), 5, device=self.model.device)
        self.model(input_ids=token, past_key_values=self.cache, logits_to_keep=1)
        _wait(self.model)


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def in_sequence(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The prompt with all tokens of both views."""
    tiles = split_tiles(inputs["hd_pixel_values"], ZOOM).flatten(0, 1)
    views = torch.cat([inputs["pixel_values"], tiles])
    image = torch.cat(list(model.get_image_features(pixel_values=views, return_dict=True).pooler_output))
    text = model.get_input_embeddings()(inputs["input_ids"][0, -WORDS:])
    return {"inputs_embeds": torch.cat([image.to(text.dtype), text])[None]}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every way in turns, and their ratios to the base model's."""
    dtype = getattr(torch, options.dtype)
    base = build(options.width, options.layers, kv_heads=options.kv_heads, device=options.device, dtype=dtype)
    inputs = question(base, WORDS, ZOOM)
    low_res = {name: value for name, value in inputs.items() if not name.startswith("hd_")}
    cells = (base.config.vision_config.image_size // base.config.vision_config.patch_size) ** 2
    same, moving = (policy(round(options.selected * cells)) for policy in (flexkit.Center, flexkit.TopK))
    patched = flexkit.patch_model(copy.deepcopy(base), flexkit.FlexConfig(zoom=ZOOM, policy=same), trained=True)
    ways = {
        "base": Way(base, low_res),
        "flexkit": Way(patched, inputs, policy=same, projection="lazy"),
        # With random weights a map changes a lot from token to token.
        "flexkit_moving": Way(patched, inputs, policy=moving, projection="lazy"),
        "recompute": Way(patched, inputs, policy=same, projection="recompute"),
    }
    everything = Way(base, in_sequence(base, inputs))
    for way in ways.values():
        way.prefill()
    found = {
        "prefill": alternate({name: way.prefill for name, way in ways.items()}, options.rounds),
        "decode": alternate({name: way.decode for name, way in ways.items()}, options.rounds * 4),
    }
    longer = {"flexkit": ways["flexkit"], "all_in_sequence": everything}
    found["prefill_of_all"] = alternate({name: way.prefill for name, way in longer.items()}, options.long_rounds)
    found["decode_of_all"] = alternate({name: way.decode for name, way in longer.items()}, options.rounds * 4)
    return {
        **facts(base, options),
        "image_tokens": cells,
        "high_res_tokens": cells * ZOOM**2,
        "text_tokens": WORDS,
        "selected": round(options.selected * cells) / cells,
        "seconds": found,
        "ratios": {
            "prefill": ratios(found["prefill"], "base"),
            "decode": ratios(found["decode"], "base"),
            "prefill_of_all": ratios(found["prefill_of_all"], "flexkit"),
            "decode_of_all": ratios(found["decode_of_all"], "flexkit"),
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one language model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads of 128 channels")
    parser.add_argument(
        "--selected", type=float, default=0.1, help="share of the high-res tokens; default: %(default)s"
    )
    parser.add_argument("--long-rounds", type=int, default=1, help="of the prefill of all tokens")
    add_common(parser)
    options = parser.parse_args(arguments)
    write(options.output, measure(options))


if __name__ == "__main__":
    main()
