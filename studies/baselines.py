"""What else a frozen model can do with a high-res view: look twice, in two ways.

Both ask once to learn where to look, from the map of one layer, and then ask again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import flexkit
from flexkit.encoding import split_tiles, stitch_tiles
from flexkit.probing import patched, without_high_res
from flexkit.visual_search.model import CELLS, ZOOM

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Looker:
    """Where a frozen model looks.

    Attributes
    ----------
    model : torch.nn.Module
        Not patched.
    layer : int
        Whose map is taken.
    policy : flexkit.Policy
        Selects cells by it.
    """

    model: Any
    layer: int
    policy: flexkit.Policy

    @torch.no_grad()
    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Map and selected cells, each ``(batch, 8, 8)``."""
        config = flexkit.FlexConfig.training_free(
            high_res_states="features", gate=None, start_layer=self.layer, policy=self.policy, zoom=ZOOM
        )
        with patched(self.model, config), flexkit.trace(self.model) as trace:
            self.model(**inputs, logits_to_keep=1)
        mask = trace.mask(0, self.layer)
        return trace.scores(0, self.layer), mask[:, ::ZOOM, ::ZOOM]


@torch.no_grad()
def insert_selected(look: Looker, inputs: Inputs) -> Tensor:
    """Ask again with the selected high-res tokens in the sequence, in place of the low-res tokens of their cells.

    They stand behind the image's tokens; the low-res ones are hidden from everyone.

    Returns
    -------
    torch.Tensor
        ``(batch, vocabulary)``: the logits of the answer.
    """
    model = look.model
    _, cells = look(inputs)
    features = _features(model, inputs["hd_pixel_values"])
    selected = cells.repeat_interleave(ZOOM, 1).repeat_interleave(ZOOM, 2).flatten(1)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    is_image = inputs["input_ids"] == model.config.image_token_id
    low_res = model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output
    embeddings[is_image] = torch.cat(list(low_res))
    sequences, seen = [], []
    for index, tokens in enumerate(embeddings):
        behind = int(is_image[index].nonzero()[-1]) + 1
        visible = inputs["attention_mask"][index].clone()
        visible[is_image[index]] = (~cells[index].flatten()).to(visible.dtype)
        inserted = features[index][selected[index]]
        sequences.append(torch.cat([tokens[:behind], inserted, tokens[behind:]]))
        seen.append(torch.cat([visible[:behind], visible.new_ones(len(inserted)), visible[behind:]]))
    padded = [pad_sequence(rows, batch_first=True, padding_side="left") for rows in (sequences, seen)]
    return model(inputs_embeds=padded[0], attention_mask=padded[1], logits_to_keep=1).logits[:, -1]


@torch.no_grad()
def zoom_in(look: Looker, inputs: Inputs) -> Tensor:
    """Ask again with one tile of the high-res view as the image: that where the map is highest.

    Returns
    -------
    torch.Tensor
        ``(batch, vocabulary)``: the logits of the answer.
    """
    scores, _ = look(inputs)
    peak = scores.flatten(1).argmax(-1)
    row, column = (place * ZOOM // CELLS for place in (peak // CELLS, peak % CELLS))
    tiles = split_tiles(inputs["hd_pixel_values"], ZOOM)
    closer = tiles[torch.arange(len(tiles)), row * ZOOM + column]
    return look.model(**without_high_res(inputs) | {"pixel_values": closer}, logits_to_keep=1).logits[:, -1]


def _features(model: Any, view: Tensor) -> Tensor:
    """High-res tokens in raster order, ``(batch, tokens, dim)``."""
    tiles = split_tiles(view, ZOOM)
    tokens = model.get_image_features(pixel_values=tiles.flatten(0, 1), return_dict=True).pooler_output
    grouped = rearrange(list(tokens), "(b t) n d -> b t n d", t=ZOOM * ZOOM)
    return stitch_tiles(grouped, (CELLS, CELLS), ZOOM).flatten(1, 2)
