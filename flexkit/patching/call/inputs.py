"""What a call is given besides the base model's inputs: high-res views, and the positions that read them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flexkit.attention.ragged import RaggedIndex
from flexkit.encoding import TileView
from flexkit.errors import HighResInputError
from flexkit.grids import Grid
from flexkit.patching.config import FlexConfig
from flexkit.patching.geometry.base import PREFIX, Geometry, check_readable
from flexkit.patching.memory.high_res import HighResMemory
from flexkit.patching.memory.tokens import ReadTiles
from flexkit.patching.state import Patch
from flexkit.selection import margin_cells

__all__ = [
    "IGNORED",
    "View",
    "asks_last",
    "check_inputs",
    "checked_views",
    "input_names",
    "kept_positions",
    "query_rows",
]

_TILES = ("hd_tiles", "hd_frames")
"""Of images, and of videos: views in tiles that are read when they are wanted."""
IGNORED = -100
"""The label of a position that predicts nothing."""


def input_names(patch: Patch) -> tuple[str, ...]:
    """The arguments that a patched model takes besides its own."""
    names = [name for own in patch.views.values() for name in own]
    return tuple(dict.fromkeys((*names, "hd_queries")))


def check_inputs(model: nn.Module, patch: Patch, inputs: Mapping[str, Any]) -> None:
    """Raise :class:`~flexkit.errors.HighResInputError` for ``hd_*`` inputs that no call of a patched model takes."""
    unknown = sorted(set(inputs) - set(input_names(patch)))
    if unknown:
        raise HighResInputError(
            f"{type(model).__name__} takes no {unknown}; its high-res inputs are {list(input_names(patch))}."
        )
    if "hd_queries" in inputs:
        _check_positions("hd_queries", inputs["hd_queries"])


@dataclass(frozen=True)
class View:
    """The high-res view of all images, or of all videos, found to be one."""

    geometry: Geometry
    zoom: Grid
    inputs: dict[str, Tensor]
    """Without the prefix of their names; empty where tiles are read."""
    grids: Sequence[Grid]
    margins: Sequence[Tensor | None]
    """For each image ``(2,)``: padded cells on each side; None where there are none."""
    tiles: Sequence[Sequence[ReadTiles]] | None = None
    """For each image and level what reads its tiles; None where views are encoded as a whole."""


def checked_views(model: Any, patch: Patch, inputs: Mapping[str, Any], low_res: Mapping[str, object]) -> list[View]:
    """What the ``hd_*`` inputs show: images, videos, or both.

    Parameters
    ----------
    model : torch.nn.Module
        The patched model.
    patch : Patch
        Its patch.
    inputs : mapping
        The ``hd_*`` inputs of the call.
    low_res : mapping
        The base model's inputs of the call.

    Raises
    ------
    HighResInputError
        If they are not what the model takes, or contradict the base model's inputs.
    """
    given = {name: value for name, value in inputs.items() if name not in _TILES}
    wrong = [f"{name} ({type(value).__name__})" for name, value in given.items() if not isinstance(value, Tensor)]
    if wrong:
        raise HighResInputError(f"high-res inputs must be tensors, not {', '.join(wrong)}; use return_tensors='pt'.")
    for name, value in given.items():
        check_readable(name, value)
    views = []
    for geometry, names in patch.views.items():
        own = {name: inputs[name] for name in names if name in inputs}
        if not own:
            continue
        in_tiles = any(name in own for name in _TILES)
        view = (_of_tiles if in_tiles else _of_tensors)(model, patch, geometry, own, low_res)
        if not view.grids:
            raise HighResInputError("0 high-res views were given; leave hd_* out of a call without images.")
        geometry.check_low_res(model, low_res, view.grids)
        views.append(view)
    return views


def _of_tensors(
    model: Any, patch: Patch, geometry: Geometry, inputs: Mapping[str, Any], low_res: Mapping[str, object]
) -> View:
    zoom = patch.config.zoom_pair if geometry.axes == 2 else patch.config.video_zoom
    if patch.config.levels > 1 and geometry.axes == 2:
        raise HighResInputError(
            f"the model reads {patch.config.levels} levels of zoom, and {sorted(inputs)} hold one; give the hd_tiles "
            "that a flexkit.FlexProcessor of this model makes, or patch it with levels=1."
        )
    required = [PREFIX + name for name in geometry.inputs]
    missing = [name for name in required if name not in inputs]
    if missing:
        raise HighResInputError(f"high-res inputs lack {missing}; pass all of {required}.")
    views: dict[str, Tensor] = {name: inputs[PREFIX + name] for name in geometry.inputs}
    first = geometry.inputs[0]
    if views[first].shape[:1] == (0,):
        raise HighResInputError(f"{PREFIX}{first} holds 0 high-res views; leave hd_* out of a call without images.")
    base = {name: low_res.get(name) for name in views}
    base[first] = next((low_res[name] for name in (first, *geometry.pixels) if low_res.get(name) is not None), None)
    known, declared = dict[str, int](), geometry.declared(model, zoom)
    for name in geometry.inputs:
        if name in declared:
            declared[name].check_axes(PREFIX + name, views[name], known, base[name])
            views[name] = declared[name].checked(PREFIX + name, views[name], base[name])
    grids = geometry.grids(model, views, zoom)
    sizes = None if "image_sizes" in views else inputs.get("hd_image_sizes")
    margins = [None] * len(grids) if sizes is None else _margins(sizes, grids)
    tiles = geometry.cut(views, zoom) if patch.config.tiles == "on_demand" else None
    for own, grid in zip(tiles or (), grids, strict=False):
        expected = math.prod(grid[:-2]) * math.prod(zoom[:-2] if geometry.whole_frames else zoom)
        if any(len(each) != expected for each in own):
            raise HighResInputError(
                f"{type(geometry).__name__}.cut gave {[len(each) for each in own]} tiles of an image for "
                f"{geometry.inputs}; a zoom of {zoom} has {expected}."
            )
    return View(
        geometry, zoom, views, grids, margins, None if tiles is None else [[partial(_taken, own)] for own in tiles]
    )


def _taken(tiles: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    return [views[index] for views in tiles]


def _of_tiles(
    model: Any, patch: Patch, geometry: Geometry, inputs: Mapping[str, Any], low_res: Mapping[str, object]
) -> View:
    name, what = (_TILES[1], "video") if geometry.axes == 3 else (_TILES[0], "image")
    grid, zoom = geometry.tile_grid(model), patch.config.zoom_pair if geometry.axes == 2 else patch.config.video_zoom
    if grid is None:
        raise HighResInputError(
            f"{type(model).__name__} encodes a high-res view as a whole and takes no {name}; pass "
            f"{[PREFIX + own for own in geometry.inputs]}."
        )
    views, zooms = inputs[name], patch.config.zooms if geometry.axes == 2 else (zoom[-2:],)
    if not isinstance(views, list | tuple):
        views = [views]
    for view in views:
        if not isinstance(view, TileView) or tuple(view.zooms) != zooms:
            given = f"zooms {tuple(view.zooms)}" if isinstance(view, TileView) else f"a {type(view).__name__}"
            raise HighResInputError(
                f"{name} holds {given}; expected one flexkit.TileView with zooms {zooms} for each {what}: prepare the "
                f"{what}s with a flexkit.FlexProcessor of this model."
            )
        if geometry.axes == 3 and (view.frames < 1 or view.frames % zoom[0]):
            raise HighResInputError(
                f"{name} holds a video of {view.frames} frames; expected a number divisible by {zoom[0]}, its zoom."
            )
    grids: list[Grid] = [grid if geometry.axes == 2 else (view.frames // zoom[0], *grid) for view in views]
    like = model.device, model.dtype
    tiles = [[partial(_read, view, level, *like) for level in range(len(zooms))] for view in views]
    sizes = inputs.get("hd_image_sizes")
    margins = [None] * len(grids) if sizes is None else _margins(sizes, grids)
    return View(geometry, zoom, {}, grids, margins, tiles)


def _read(view: TileView, level: int, device: torch.device, dtype: torch.dtype, index: Tensor) -> list[Tensor]:
    return [own.to(device, dtype) for own in view.read(level, index.tolist())]


def _margins(image_sizes: Tensor, grids: Sequence[Any]) -> list[Tensor | None]:
    if image_sizes.shape != (len(grids), 2):
        raise HighResInputError(
            f"hd_image_sizes has shape {tuple(image_sizes.shape)}; expected ({len(grids)}, 2): the (height, width) "
            "of each original image."
        )
    margins = [margin_cells(size[None].cpu(), grid)[0] for size, grid in zip(image_sizes, grids, strict=True)]
    return [each if each.any() else None for each in margins]


def query_rows(
    config: FlexConfig,
    inputs: Mapping[str, Any],
    memory: HighResMemory,
    named: Tensor | None,
    *,
    past: int | Tensor,
    length: int,
    repeats: int,
) -> RaggedIndex:
    """The querying positions of a call.

    Parameters
    ----------
    config : FlexConfig
        The patch's settings.
    inputs : mapping
        The base model's inputs: labels, attention_mask and logits_to_keep decide.
    memory : HighResMemory
        Rows without an image never query.
    named : torch.Tensor, optional
        ``(batch, positions)``, bool: positions from the start of the sequence, named for this call; later ones query.
    past, length : int
        Positions before the call, and in it.
    repeats : int
        How many successive batch rows continue one sample.
    """
    labels, padding = inputs.get("labels"), inputs.get("attention_mask")
    kept = inputs.get("logits_to_keep", 0)
    asks = labels is None and named is None and isinstance(config.queries, str) and isinstance(kept, int)
    if length == 1 and asks and len({span.row for span in memory.images}) == memory.batch:
        is_padded = isinstance(padding, Tensor) and padding.ndim == 2
        last = padding[:, -1:].bool() if is_padded else torch.ones(memory.batch, 1, dtype=torch.bool)  # type: ignore[index]
        return RaggedIndex(last.to(memory.features.device), in_place=True, full=not is_padded)  # nobody has to count
    has_image = memory.rows_with_images
    attended = torch.ones(memory.batch, length, dtype=torch.bool, device=has_image.device)
    # Masks other than a padding mask come from generate, which pads on the left.
    if isinstance(padding, Tensor) and padding.ndim == 2:
        attended = padding[:, -length:].bool().to(has_image.device)
    if named is None and isinstance(config.queries, Tensor):
        named = _check_positions("queries", config.queries)
    if labels is not None:
        mask = torch.zeros_like(attended)
        mask[:, :-1] = labels[:, 1:] != IGNORED
    elif named is not None:
        mask = _named(named.to(attended.device), memory.batch, past, length, repeats)
    elif config.queries == "all":
        mask = attended
    else:
        if isinstance(kept, Tensor):
            asked = torch.zeros_like(attended)
            asked[:, kept] = True
        else:
            asked = attended.flip(-1).cumsum(-1).flip(-1) <= max(1, kept)
        mask = attended & asked
    return RaggedIndex(mask & has_image[:, None])


def asks_last(config: FlexConfig) -> bool:
    """Whether the last position of a prompt queries, and all behind it."""
    return isinstance(config.queries, str) and config.queries == "last"


def kept_positions(logits_to_keep: int | Tensor, length: int) -> Tensor:
    """``(kept,)``, int64: the positions whose logits a model returns."""
    positions = torch.arange(length)
    if isinstance(logits_to_keep, int):
        return positions[-logits_to_keep:] if logits_to_keep else positions
    return positions[logits_to_keep.cpu()]


def _check_positions(name: str, named: object) -> Tensor:
    """Return positions that are named by a bool tensor; raise :class:`~flexkit.errors.HighResInputError` for others."""
    if not isinstance(named, Tensor) or named.ndim != 2 or named.is_meta:
        given = (
            f"a tensor {tuple(named.shape)} on {named.device}" if isinstance(named, Tensor) else type(named).__name__
        )
        raise HighResInputError(f"{name} must be a bool tensor (batch, positions), got {given}.")
    if named.dtype != torch.bool:
        raise HighResInputError(f"{name} are {named.dtype} of shape {tuple(named.shape)}; expected torch.bool.")
    return named


def _named(named: Tensor, batch: int, past: int | Tensor, length: int, repeats: int) -> Tensor:
    named = named.repeat_interleave(repeats, dim=0) if len(named) * repeats == batch else named
    too_long = isinstance(past, int) and named.shape[1] > past + length
    if len(named) != batch or too_long:
        raise HighResInputError(
            f"queries are {named.dtype} of shape {tuple(named.shape)}; expected torch.bool of shape ({batch}, "
            f"{past + length}) or shorter: one entry a position, from the start of the sequence."
        )
    if not named.shape[1]:
        return named.new_ones(batch, length)
    place = past + torch.arange(length, device=named.device)
    return named[:, place.clamp_max(named.shape[1] - 1)] | (place >= named.shape[1])
