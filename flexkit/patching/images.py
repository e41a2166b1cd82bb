"""Reading the high-res views of the images in a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexkit.errors import HighResInputError, UnsupportedModelError
from flexkit.grids import Pair, pyramid
from flexkit.patching.features import Encoded, ReadTiles, Tiled, TiledImage
from flexkit.patching.memory import HighResMemory, ImageSpan
from flexkit.patching.state import Patch
from flexkit.patching.views import View, checked_view

__all__ = ["read_images"]


def read_images(
    model: Any,
    patch: Patch,
    inputs: Mapping[str, Tensor],
    image_tokens: Tensor,
    low_res: Mapping[str, object],
    *,
    past: int,
    repeats: int,
) -> HighResMemory:
    """Take the high-res views, encoded or in tiles, and find the low-res tokens that they belong to.

    Parameters
    ----------
    model : torch.nn.Module
        The patched model.
    patch : Patch
        Its patch.
    inputs : mapping
        The ``hd_*`` inputs of the call.
    image_tokens : torch.Tensor
        ``(batch, length)``, bool: where the new part of the sequence holds image tokens.
    low_res : mapping
        The base model's inputs of the call.
    past : int
        Positions in front of the new part.
    repeats : int
        How many successive batch rows continue one sample (beams).

    Raises
    ------
    HighResInputError
        If the views do not fit the images of the prompt.
    """
    geometry, zoom = patch.geometry, patch.config.zoom_pair
    view = checked_view(model, patch, inputs, low_res)
    layouts = [_layout(model, patch, grid) for grid in view.grids]
    spans = _spans(image_tokens[::repeats], view.grids, layouts, zoom, view.margins, past, geometry.overview_only)
    batch = len(image_tokens) // repeats
    if view.tiles is None:
        memory = _whole(model, patch, view, spans, batch)
    else:
        memory = _in_tiles(model, patch, view.tiles, spans, batch)
    return memory if repeats == 1 else memory.repeat_interleave(repeats)


def _layout(model: Any, patch: Patch, grid: Pair) -> Tensor:
    """Which image tokens of an image are cells, found to be as many as the grid has."""
    layout, cells = patch.geometry.layout(model, grid), grid[0] * grid[1]
    if layout.dtype != torch.bool or int(layout.sum()) != cells:
        raise UnsupportedModelError(
            f"{type(patch.geometry).__name__}.layout marks {int(layout.sum())} of {len(layout)} tokens as cells "
            f"({layout.dtype}); a grid of {grid} has {cells}, marked by a torch.bool tensor."
        )
    return layout


def _whole(model: Any, patch: Patch, view: View, spans: Sequence[ImageSpan], batch: int) -> HighResMemory:
    """The memory of views that are encoded as a whole."""
    features = patch.geometry.encode(model, view.inputs, view.grids, patch.config.zoom_pair)
    for feature, span in zip(features, spans, strict=True):
        if len(feature) != span.tokens:
            raise HighResInputError(
                f"the model encoded a high-res view to {len(feature)} tokens; a {span.grid} grid zoomed {span.zoom} "
                f"has {span.tokens}."
            )
    return HighResMemory.pack(features, spans, batch)


def _in_tiles(
    model: Any, patch: Patch, tiles: Sequence[Sequence[ReadTiles]], spans: Sequence[ImageSpan], batch: int
) -> HighResMemory:
    """The memory of views in tiles, every level of which stands for itself."""
    levels = list(enumerate(pyramid(patch.config.zoom_pair, patch.config.levels)))
    of_levels = [replace(span, zoom=zoom, level=level) for span in spans for level, zoom in levels]
    unread = torch.empty(0, 1, model.get_input_embeddings().embedding_dim, dtype=model.dtype, device=model.device)
    readers = [read for own in tiles for read in own]
    images = [TiledImage(read, of.grid, of.zoom, unread) for read, of in zip(readers, of_levels, strict=True)]
    memory = HighResMemory.laid_out(Tiled(tuple(images)), of_levels, batch)
    if patch.config.tiles == "on_demand":
        return memory
    encode = partial(patch.geometry.encode_tiles, model)
    return replace(memory, features=Encoded(memory.features_of(None, encode)))


def _spans(
    image_tokens: Tensor,
    grids: Sequence[Pair],
    layouts: Sequence[Tensor],
    zoom: Pair,
    margins: Sequence[Tensor | None],
    past: int,
    overview_only: str,
) -> list[ImageSpan]:
    """Share out the image tokens of every batch row among the images, in order."""
    lengths = [len(layout) for layout in layouts]
    held = image_tokens.sum(-1).tolist()
    spans: list[ImageSpan] = []
    for row, tokens in enumerate(image_tokens):
        left = tokens.nonzero().flatten() + past
        while len(left):
            index = len(spans)
            if index == len(grids) or lengths[index] > len(left):
                raise HighResInputError(
                    f"the prompt holds {held} image tokens in its rows; the {len(grids)} high-res views fit images of "
                    f"{lengths} tokens, in this order. Pass one high-res view for each image of the prompt, in its "
                    "order." + (f" The prompt must carry overviews only: {overview_only}." if overview_only else "")
                )
            columns = left[: lengths[index]][layouts[index].to(left.device)]
            padded = margins[index]
            margin = None if padded is None else padded.to(left.device)
            spans.append(ImageSpan(row, columns, grids[index], zoom, 0, index, margin))
            left = left[lengths[index] :]
    if len(spans) != len(grids):
        raise HighResInputError(f"{len(grids)} high-res views were given for {len(spans)} images in the prompt.")
    return spans
