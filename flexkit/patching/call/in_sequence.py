"""Calls of a model whose image tokens stand in the decoder's own sequence."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn.functional import pad

from flexkit.errors import HighResInputError, UnsupportedModelError
from flexkit.patching.call.call import FlexCall
from flexkit.patching.call.following import Following
from flexkit.patching.call.inputs import View, checked_views, query_rows
from flexkit.patching.call.one_selection import OneSelection
from flexkit.patching.call.own_states import OwnStates
from flexkit.patching.call.route import Prompt, Route
from flexkit.patching.geometry.base import Geometry
from flexkit.patching.memory.high_res import HighResMemory, cached_length, cached_memory
from flexkit.patching.memory.resident import move_out
from flexkit.patching.memory.tokens import Encoded, ImageSpan, Tiled, TiledImage
from flexkit.patching.seam.config_view import CALL
from flexkit.patching.seam.decoder import DecoderLayer, find_layers
from flexkit.patching.state import Patch

__all__ = ["InSequence", "route_of"]


class InSequence(Route):
    """Image tokens are positions of the decoder's sequence, and its layers read."""

    runs_tokens = True

    def layers(self, model: nn.Module, decoder: nn.Module) -> list[DecoderLayer]:
        return find_layers(decoder)

    def prepare(
        self,
        model: nn.Module,
        patch: Patch,
        high_res: dict[str, Any],
        inputs: dict[str, Any],
        prompt: Prompt | None,
    ) -> FlexCall | Following | None:
        prompt = prompt or Prompt()
        cache = inputs.get("past_key_values")
        past = cached_length(cache)
        memory = cached_memory(cache)
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        tokens = embeds if ids is None else ids
        if tokens is None or (memory is None and not high_res):
            return None
        batch, length = tokens.shape[:2]
        named = high_res.pop("hd_queries", None)
        if memory is not None and memory.resident is not None:
            is_plain = named is None and isinstance(patch.config.queries, str) and not patch.recorders
            if is_plain and (batch, length) == (memory.batch, 1) and not _brings_images(patch, inputs):
                following = Following.begin(memory, cache, past)
                if following is not None:
                    return following
            memory = move_out(cache, memory)
        if high_res and prompt.image_tokens is not None:
            if memory is None:
                found = torch.stack([each.image_tokens(model, ids, embeds) for each in patch.views])
                front = int(past) + _in_front(prompt.image_tokens.any(0), found.any(0), ids is not None)
                memory = read_images(model, patch, high_res, prompt.image_tokens, inputs, front, prompt.repeats)
                memory.front = front
            named = prompt.queries
            if named is not None and isinstance(past, int):
                named = pad(named, (memory.front, 0))[:, : past + length]  # the rest is named for later chunks
        elif high_res:
            image_tokens = torch.stack([each.image_tokens(model, ids, embeds) for each in patch.views])
            # Generate hands the same views in at every step; once read they are in the memory. It may also decode a
            # token that happens to be the image token.
            if memory is None or (_brings_images(patch, inputs) and bool(image_tokens.any())):
                new = read_images(model, patch, high_res, image_tokens, inputs, int(past), prompt.repeats)
                memory = new if memory is None else memory.joined(new)
        if memory is None:
            raise HighResInputError("hd_queries were given without a high-res view.")
        if memory.batch != batch:
            raise HighResInputError(
                f"the KV cache holds high-res tokens of {memory.batch} rows, the inputs have {batch}; change the batch "
                "of a cache with its own methods (batch_repeat_interleave, batch_select_indices)."
            )
        rows = query_rows(patch.config, inputs, memory, named, past=past, length=length, repeats=prompt.repeats)
        own = None
        if patch.config.high_res_states == "own":
            own = OwnStates(
                0 if isinstance(past, Tensor) else past,
                length,
                held=memory.projected,
                notes_read=patch.config.kept is not None,
            )
        one = None
        if patch.config.select_layers is not None:
            shared = patch.config.shares_selection
            one = OneSelection.begin(rows, past, memory.tokens, memory.answer, shared=shared)
        return FlexCall(
            patch,
            memory,
            rows,
            past,
            patch.projection(cache),
            model.training,
            [partial(_as_read, model, patch, geometry.encode_tiles) for geometry in patch.views],
            own=own,
            one=one,
        )

    def run(self, forward: Callable[..., Any], call: Any, inputs: Mapping[str, Any]) -> Any:
        with call.running() if isinstance(call, Following) else nullcontext():
            return forward(**inputs, **{CALL: call})


_IN_SEQUENCE = InSequence()


def route_of(geometry: Geometry) -> Route:
    """How calls of a model with this geometry reach the attention that reads."""
    return geometry.route or _IN_SEQUENCE


def _brings_images(patch: Patch, inputs: Mapping[str, Any]) -> bool:
    """Whether a call has the low-res view of an image, or features of it."""
    encoded = [features for features in (inputs.get("mm_encoder_outputs") or {}).values() if features is not None]
    pixels = (name for each in patch.views for name in (each.inputs[0], *each.pixels))
    return bool(encoded) or any(inputs.get(name) is not None for name in pixels)


def read_images(
    model: Any,
    patch: Patch,
    inputs: Mapping[str, Tensor],
    image_tokens: Tensor,
    low_res: Mapping[str, object],
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
        ``(kinds, batch, length)``, bool: where the new part of the sequence holds tokens of images, and of videos.
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
    views = checked_views(model, patch, inputs, low_res)
    of_kinds = dict(zip(patch.views, image_tokens[:, ::repeats], strict=True))
    spans = [_spans(model, of_kinds[view.geometry], view, past) for view in views]
    batch = image_tokens.shape[1] // repeats
    if any(view.tiles is None for view in views):
        if not all(view.inputs for view in views):
            raise HighResInputError(
                'one of the views is read in tiles when it is wanted, and the other as a whole; set tiles="on_demand", '
                "or give both as tensors."
            )
        memory = _whole(model, patch, views, spans, batch)
    else:
        memory = _in_tiles(model, patch, views, spans, batch)
    return memory if repeats == 1 else memory.repeat_interleave(repeats)


def _whole(
    model: Any, patch: Patch, views: Sequence[View], spans: Sequence[Sequence[ImageSpan]], batch: int
) -> HighResMemory:
    """The memory of views that are encoded as a whole."""
    found: list[tuple[Tensor, ImageSpan]] = []  # images and videos, as they stand in the prompt
    for view, own in zip(views, spans, strict=True):
        features = _as_read(model, patch, view.geometry.encode, view.inputs, view.grids, view.zoom)
        for feature, span in zip(features, own, strict=True):
            if len(feature) != span.tokens:
                raise HighResInputError(
                    f"the model encoded a high-res view to {len(feature)} tokens; a {span.grid} grid zoomed "
                    f"{span.zoom} has {span.tokens}."
                )
            found.append((feature, span))
    found.sort(key=lambda each: (each[1].row, each[1].end))
    return HighResMemory.pack([feature for feature, _ in found], [span for _, span in found], batch)


def _in_tiles(
    model: Any, patch: Patch, views: Sequence[View], spans: Sequence[Sequence[ImageSpan]], batch: int
) -> HighResMemory:
    """The memory of views in tiles, every level of which stands for itself."""
    unread = torch.zeros(1, model.get_input_embeddings().embedding_dim, dtype=model.dtype, device=model.device)
    found: list[tuple[TiledImage, ImageSpan]] = []  # images and videos, as they stand in the prompt
    for view, own in zip(views, spans, strict=True):
        kind = list(patch.views).index(view.geometry)
        zooms = patch.config.zooms if view.geometry.axes == 2 else [view.zoom]
        for span, readers in zip(own, view.tiles or (), strict=True):
            for level, (zoom, read) in enumerate(zip(zooms, readers, strict=True)):
                cut = (1, 1) if view.geometry.whole_frames else zoom[-2:]
                *frames, rows, columns = (cells * factor for cells, factor in zip(span.grid, zoom, strict=True))
                image = TiledImage(read, (rows // cut[0], columns // cut[1]), (*frames, *cut), kind)
                found.append((image, replace(span, zoom=zoom, level=level)))
    found.sort(key=lambda each: (each[1].row, each[1].end))
    images, of_levels = zip(*found, strict=True)
    memory = HighResMemory.laid_out(Tiled(unread, images), of_levels, batch)
    if patch.config.tiles == "on_demand":
        return memory
    encode = [partial(_as_read, model, patch, geometry.encode_tiles) for geometry in patch.views]
    return replace(memory, features=Encoded(memory.features.of(memory.all_tokens, memory.images, encode)))


def _as_read(model: Any, patch: Patch, encode: Callable[..., Any], *inputs: Any) -> Any:
    """Features ``(..., parts * dim)`` as they are read: a token carries at once what a low-res one has carried.

    Own states carry it as a low-res one does, layer by layer.
    """
    features = encode(model, *inputs)
    dim = model.get_input_embeddings().embedding_dim
    if patch.config.high_res_states == "own" or features[0].shape[-1] == dim:
        return features
    summed = [reduce(image, "n (parts dim) -> n dim", "sum", dim=dim) for image in features]
    return torch.stack(summed) if isinstance(features, Tensor) else summed


def _spans(model: Any, image_tokens: Tensor, view: View, past: int) -> list[ImageSpan]:
    """Share out the image tokens of every batch row among the images, in order."""
    geometry, grids, zoom = view.geometry, view.grids, view.zoom
    by_grid = {grid: geometry.layout(model, grid) for grid in grids}
    for grid, layout in by_grid.items():
        if layout.dtype != torch.bool or int(layout.sum()) != math.prod(grid):
            raise UnsupportedModelError(
                f"{type(geometry).__name__}.layout marks {int(layout.sum())} of {len(layout)} tokens as cells "
                f"({layout.dtype}); a grid of {grid} has {math.prod(grid)}, marked by a torch.bool tensor."
            )
    layouts, overview_only = [by_grid[grid] for grid in grids], geometry.overview_only
    lengths, device = [len(layout) for layout in layouts], image_tokens.device
    marked = image_tokens.cpu().numpy()  # the host waits once, and not for each image
    held = marked.sum(-1).tolist()
    spans: list[ImageSpan] = []
    for row, tokens in enumerate(marked):
        left = tokens.nonzero()[0] + past
        while len(left):
            index = len(spans)
            if index == len(grids) or lengths[index] > len(left):
                raise HighResInputError(
                    f"the prompt holds {held} image tokens in its rows; the {len(grids)} high-res views fit images of "
                    f"{lengths} tokens, in this order. Pass one high-res view for each image of the prompt, in its "
                    "order." + (f" The prompt must carry overviews only: {overview_only}." if overview_only else "")
                )
            columns = left[: lengths[index]][layouts[index].cpu().numpy()]
            padded = view.margins[index]
            margin = None if padded is None else padded.to(device)
            first, last = columns[[0, -1]].tolist()
            begin = first if last - first + 1 == len(columns) else None
            placed = torch.from_numpy(columns).to(device)
            spans.append(ImageSpan(row, placed, grids[index], zoom, 0, index, margin, last + 1, begin=begin))
            left = left[lengths[index] :]
    if len(spans) != len(grids):
        raise HighResInputError(f"{len(grids)} high-res views were given for {len(spans)} images in the prompt.")
    return spans


def _in_front(noted: Tensor, found: Tensor, by_ids: bool) -> int:
    """How many positions of a call stand in front of its prompt: those that no token stands for (PEFT's prompts).

    Parameters
    ----------
    noted : torch.Tensor
        ``(batch, prompt)``, bool: where the prompt that ``generate`` was given holds image tokens.
    found : torch.Tensor
        ``(batch, length)``, bool: where the call holds them; it may be a chunk of the prompt, or run on behind it.
    by_ids : bool
        Whether they were found among ids: embeddings may hold features in the place of image tokens.

    Raises
    ------
    HighResInputError
        If these are not the image tokens of one prompt.
    """
    if not by_ids and noted.shape == found.shape and not found.any():
        return 0
    both = noted.any(-1) & found.any(-1)
    starts = set((found.int().argmax(-1) - noted.int().argmax(-1))[both].tolist()) or ({0} if by_ids else set())
    front = starts.pop() if len(starts) == 1 else -1
    if front >= 0:
        expected = pad(noted, (front, 0))
        length = min(expected.shape[1], found.shape[1])
        if torch.equal(found[:, :length], expected[:, :length]):
            return int(front)
    raise HighResInputError(
        f"generate was given a prompt of {noted.shape[1]} positions with {noted.sum(-1).tolist()} image tokens in its "
        f"rows; the model is given {found.shape[1]} positions with {found.sum(-1).tolist()}, which are not that prompt "
        "behind something else. Put as many positions in front of every row, and no image tokens among them."
    )
