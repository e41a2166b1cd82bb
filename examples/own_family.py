"""Patch a model that flexkit, and transformers, do not know.

A small model with random weights, of the kind that one writes for a paper: a convolution looks at a square picture, the
features stand in the prompt with a full stop behind them, and a Llama writes. To be patched it takes a geometry: what
flexkit must know about where image tokens are, and how to make more of them.

    python examples/own_family.py
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig, LlamaModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import flexkit
from flexkit.encoding import split_tiles

PICTURE = 90
"""The id of image tokens."""
PATCH = 4
"""Pixels to a side of a patch."""
CELLS = 3
"""Patches to a side of a picture."""

# --- The model ------------------------------------------------------------------------------------------------------


class SketchConfig(PreTrainedConfig):
    model_type = "sketch"

    def get_text_config(self, *args: object, **kwargs: object) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
        )


class Sketch(PreTrainedModel, GenerationMixin):
    config_class = SketchConfig
    _supports_sdpa = True

    def __init__(self, config: SketchConfig) -> None:
        super().__init__(config)
        self.eye = nn.Conv2d(3, 32, PATCH, PATCH)
        self.full_stop = nn.Parameter(torch.randn(32))
        self.writer = LlamaModel(config.get_text_config())
        self.head = nn.Linear(32, 96)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.writer.embed_tokens

    def look(self, sketch: Tensor) -> Tensor:
        return self.eye(sketch).flatten(2).mT

    def forward(
        self,
        input_ids: Tensor,
        sketch: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object = None,
        use_cache: bool | None = None,
        **kwargs: object,  # handed on: in them flexkit's call reaches the attention layers
    ) -> CausalLMOutputWithPast:
        states = self.writer.embed_tokens(input_ids)
        if sketch is not None and (input_ids == PICTURE).any():
            seen = torch.cat([self.look(sketch), self.full_stop.expand(len(sketch), 1, -1)], dim=1)
            states = states.masked_scatter((input_ids == PICTURE)[..., None], seen)
        output = self.writer(
            inputs_embeds=states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return CausalLMOutputWithPast(
            logits=self.head(output.last_hidden_state), past_key_values=output.past_key_values
        )


# --- What flexkit must know of it -----------------------------------------------------------------------------------


class SketchGeometry(flexkit.Geometry):
    inputs = ("sketch",)
    default_zoom = 2

    def grids(self, model: Any, inputs: Mapping[str, Tensor], zoom: tuple[int, int]) -> list[tuple[int, int]]:
        side = CELLS * PATCH
        if inputs["sketch"].shape[-2:] != (zoom[0] * side, zoom[1] * side):
            raise flexkit.HighResInputError(f"hd_sketch is to have {zoom[0] * side} x {zoom[1] * side} pixels.")
        return [(CELLS, CELLS)] * len(inputs["sketch"])

    def encode(
        self, model: Any, inputs: Mapping[str, Tensor], grids: Sequence[tuple[int, int]], zoom: tuple[int, int]
    ) -> list[Tensor]:
        with torch.no_grad():
            return list(model.look(inputs["sketch"]))

    def layout(self, model: Any, grid: tuple[int, int]) -> Tensor:
        return torch.arange(grid[0] * grid[1] + 1) < grid[0] * grid[1]  # the full stop is no cell

    def decoder(self, model: Any) -> nn.Module:
        return model.writer

    def image_tokens(self, model: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        assert input_ids is not None
        return input_ids == PICTURE


# --- If its tower took one size -------------------------------------------------------------------------------------


class TiledSketchGeometry(SketchGeometry):
    def cut(self, inputs: Mapping[str, Tensor], zoom: tuple[int, int]) -> list[tuple[Tensor, ...]]:
        return [(split_tiles(view[None], zoom)[0],) for view in inputs["sketch"]]

    def tile_grid(self, model: Any) -> tuple[int, int]:
        return CELLS, CELLS

    def encode_tiles(self, model: Any, tiles: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            return model.look(tiles[0])


# --- Use ------------------------------------------------------------------------------------------------------------


def prompts(rows: int = 2) -> dict[str, Tensor]:
    """Ids with one picture a row, and both views of the pictures."""
    ids = torch.randint(3, 80, (rows, 16))
    ids[:, 2 : 2 + CELLS**2 + 1] = PICTURE
    pictures = torch.randn(rows, 3, 2 * CELLS * PATCH, 2 * CELLS * PATCH)
    low_res = nn.functional.avg_pool2d(pictures, 2)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "sketch": low_res, "hd_sketch": pictures}


def main() -> None:
    """Patch the model, and see what it looks at."""
    torch.manual_seed(0)
    model, inputs = Sketch(SketchConfig()).eval(), prompts()
    flexkit.register_geometry("sketch", SketchGeometry())
    flexkit.patch_model(model, flexkit.FlexConfig(policy=flexkit.TopK(3)), trained=True)
    with flexkit.trace(model) as trace:
        model.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[PICTURE], pad_token_id=0)
    for step in range(len(trace)):
        mask = trace.mask(step, trace.layers[-2])  # by which the last layer reads
        print(f"token {step}: row 0 reads {int(mask[0].sum())} of {mask[0].numel()} tokens")


if __name__ == "__main__":
    main()
