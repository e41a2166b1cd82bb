"""A page of words and patches (UDOP): a tile stands on the page where it was cut out."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel

from flexkit.grids import Pair, split_tiles, stitch_tiles
from flexkit.patching.context.geometry import Places
from flexkit.patching.context.pictures import Pictures

__all__ = ["Page"]


class Page(Pictures):
    """One picture of a page for every row, words with boxes on it, and an encoder in which words take patches in.

    A patch on which a word lies has no key of its own but the word's.
    """

    def places(self, model: PreTrainedModel, inputs: Mapping[str, Any], grids: Sequence[Pair]) -> Places:
        boxes = _boxes(inputs)
        side = grids[0][1]
        batch, words = boxes.shape[:2]
        x, y = ((boxes[..., :2] + boxes[..., 2:]) / 2 * side).floor().long().clamp(0, side - 1).unbind(-1)
        columns = []
        for row in range(batch):
            left = torch.ones(side * side, dtype=torch.bool, device=boxes.device)
            left[y[row] * side + x[row]] = False  # by words without a place, too
            # A patch that the model has dropped altogether is looked at where the next one is.
            behind = words + (left.cumsum(0) - left.long()).clamp_max(int(left.sum()) - 1)
            middle = boxes[row].mean(-1)
            for word in ((middle != 0) & (middle != 1)).nonzero().flatten():
                behind[y[row, word] * side + x[row, word]] = word
            columns.append(behind)
        return Places(batch, list(range(batch)), columns)

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Pair], zoom: Pair
    ) -> list[Tensor]:
        encoder: Any = model.get_submodule("encoder")
        boxes, text = _boxes(inputs), inputs.get("inputs_embeds")
        batch, words = boxes.shape[:2]
        mask = inputs.get("attention_mask", boxes.new_ones(batch, words, dtype=torch.long))
        given = {name: value for name, value in inputs.items() if name not in ("input_ids", "pixel_values")}
        if text is None:
            with torch.no_grad():
                text = encoder.embed_tokens(inputs["input_ids"])
        rows, columns = grids[0]
        y, x = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(boxes.device).unbind(-1)
        cells = torch.stack([x / columns, y / rows, (x + 1) / columns, (y + 1) / rows], dim=-1)
        scale = boxes.new_tensor([zoom[1], zoom[0]] * 2)
        encoded = []
        for index, tile in enumerate(split_tiles(inputs["hd_pixel_values"], zoom).unbind(1)):
            corner = boxes.new_tensor([index % zoom[1], index // zoom[1]] * 2)
            with torch.no_grad():
                patches = encoder.embed_patches(tile)
            states = self.show(
                model,
                given,
                batch,
                inputs_embeds=torch.cat([text, patches], dim=1),
                bbox=torch.cat([boxes, ((cells + corner) / scale).to(boxes).expand(batch, -1, -1)], dim=1),
                attention_mask=torch.cat([mask, mask.new_ones(batch, rows * columns)], dim=1),
            )
            encoded.append(states[:, words:])
        return list(rearrange(stitch_tiles(torch.stack(encoded, 1), grids[0], zoom), "n r c d -> n (r c) d"))


def _boxes(inputs: Mapping[str, Any]) -> Tensor:
    """``(batch, words, 4)``, floating; a tokenizer may give integers."""
    boxes: Tensor = inputs["bbox"]
    return boxes if boxes.is_floating_point() else boxes.float()
