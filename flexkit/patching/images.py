"""Reading the high-res views of the images in a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexkit.errors import HighResInputError
from flexkit.patching.features import Tiled, TiledImage
from flexkit.patching.memory import HighResMemory, ImageSpan
from flexkit.patching.state import Patch
from flexkit.selection import margin_cells
from flexkit.zoom import Pair

__all__ = ["PREFIX", "View", "check_names", "checked_view", "input_names", "read_images"]

PREFIX = "hd_"
_OPTIONAL = ("hd_image_sizes", "hd_queries", "hd_repeats", "hd_image_tokens")


def input_names(patch: Patch) -> tuple[str, ...]:
    """The arguments that a patched model takes besides its own."""
    names = [PREFIX + name for name in patch.geometry.inputs]
    return tuple(dict.fromkeys((*names, *_OPTIONAL)))


def check_names(model: nn.Module, patch: Patch, inputs: Mapping[str, object]) -> None:
    """Raise :class:`~flexkit.errors.HighResInputError` for ``hd_*`` inputs that a patched model does not take."""
    unknown = sorted(set(inputs) - set(input_names(patch)))
    if unknown:
        raise HighResInputError(
            f"{type(model).__name__} takes no {unknown}; its high-res inputs are {list(input_names(patch))}."
        )


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
    layouts = [geometry.layout(model, grid) for grid in view.grids]
    spans = _spans(image_tokens[::repeats], view.grids, layouts, zoom, view.margins, past, geometry.overview_only)
    tiles = geometry.cut(view.inputs, zoom) if patch.config.tiles == "on_demand" else None
    if tiles is None:
        features = geometry.encode(model, view.inputs, view.grids, zoom)
        for feature, span in zip(features, spans, strict=True):
            if len(feature) != span.tokens:
                raise HighResInputError(
                    f"the model encoded a high-res view to {len(feature)} tokens; a {span.grid} grid zoomed {zoom} has "
                    f"{span.tokens}."
                )
        memory = HighResMemory.pack(features, spans, len(image_tokens) // repeats)
    else:
        width = model.get_input_embeddings().embedding_dim
        unread = torch.empty(0, 1, width, dtype=model.dtype, device=image_tokens.device)
        images = tuple(TiledImage(own, grid, zoom, unread) for own, grid in zip(tiles, view.grids, strict=True))
        memory = HighResMemory.laid_out(Tiled(images), spans, len(image_tokens) // repeats)
    return memory if repeats == 1 else memory.repeat_interleave(repeats)


@dataclass(frozen=True)
class View:
    """The high-res view of all images, found to be one."""

    inputs: dict[str, Tensor]
    """Without the prefix of their names."""
    grids: list[Pair]
    margins: Tensor
    """``(images, 2)``: padded cells on each side."""


def checked_view(model: nn.Module, patch: Patch, inputs: Mapping[str, Tensor], low_res: Mapping[str, object]) -> View:
    """What the ``hd_*`` inputs show, checked against the model and the base model's inputs."""
    geometry, zoom = patch.geometry, patch.config.zoom_pair
    missing = [PREFIX + name for name in geometry.inputs if PREFIX + name not in inputs]
    if missing:
        raise HighResInputError(f"high-res inputs lack {missing}; pass all of {list(input_names(patch)[:-3])}.")
    wrong = [f"{name} ({type(value).__name__})" for name, value in inputs.items() if not isinstance(value, Tensor)]
    if wrong:
        raise HighResInputError(f"high-res inputs must be tensors, not {', '.join(wrong)}; use return_tensors='pt'.")
    views = {name: inputs[PREFIX + name] for name in geometry.inputs}
    for name, view in views.items():
        if view.is_floating_point() and not bool(torch.isfinite(view).all()):
            raise HighResInputError(f"{PREFIX}{name} holds NaN or infinite values.")
    grids = geometry.grids(model, views, zoom)
    geometry.check_low_res(model, low_res, grids)
    margins = _margins(None if "image_sizes" in views else inputs.get("hd_image_sizes"), grids)
    return View(views, grids, margins)


def _margins(image_sizes: Tensor | None, grids: Sequence[Pair]) -> Tensor:
    if image_sizes is None:
        return torch.zeros(len(grids), 2, dtype=torch.long)
    if image_sizes.shape != (len(grids), 2):
        raise HighResInputError(
            f"hd_image_sizes has shape {tuple(image_sizes.shape)}; expected ({len(grids)}, 2): the (height, width) "
            "of each original image."
        )
    return torch.cat([margin_cells(size[None].cpu(), grid) for size, grid in zip(image_sizes, grids, strict=True)])


def _spans(
    image_tokens: Tensor,
    grids: Sequence[Pair],
    layouts: Sequence[Tensor],
    zoom: Pair,
    margins: Tensor,
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
            spans.append(ImageSpan(row, columns, grids[index], zoom, 0, index, margins[index].to(left.device)))
            left = left[lengths[index] :]
    if len(spans) != len(grids):
        raise HighResInputError(f"{len(grids)} high-res views were given for {len(spans)} images in the prompt.")
    return spans
