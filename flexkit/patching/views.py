"""The high-res views of a call, checked against the model and its own inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flexkit.encoding import TileView
from flexkit.errors import HighResInputError
from flexkit.grids import Pair, pyramid
from flexkit.patching.declared import check_readable
from flexkit.patching.features import ReadTiles
from flexkit.patching.queries import check_positions
from flexkit.patching.state import Patch
from flexkit.selection import margin_cells

__all__ = ["PREFIX", "View", "check_inputs", "checked_view", "input_names"]

PREFIX = "hd_"
_TILES = "hd_tiles"
_OPTIONAL = ("hd_image_sizes", _TILES, "hd_queries", "hd_repeats", "hd_image_tokens")


def input_names(patch: Patch) -> tuple[str, ...]:
    """The arguments that a patched model takes besides its own."""
    names = [PREFIX + name for name in patch.geometry.inputs]
    return tuple(dict.fromkeys((*names, *_OPTIONAL)))


def check_inputs(model: nn.Module, patch: Patch, inputs: Mapping[str, Any]) -> None:
    """Raise :class:`~flexkit.errors.HighResInputError` for ``hd_*`` inputs that no call of a patched model takes."""
    unknown = sorted(set(inputs) - set(input_names(patch)))
    if unknown:
        raise HighResInputError(
            f"{type(model).__name__} takes no {unknown}; its high-res inputs are {list(input_names(patch))}."
        )
    for name in inputs.keys() & {"hd_queries", "hd_image_tokens"}:
        check_positions(name, inputs[name])
    repeats = inputs.get("hd_repeats", 1)
    if type(repeats) is not int or repeats < 1:
        raise HighResInputError(f"hd_repeats is {repeats!r}; expected a positive int: rows that continue one sample.")


@dataclass(frozen=True)
class View:
    """The high-res view of all images, found to be one."""

    inputs: dict[str, Tensor]
    """Without the prefix of their names; empty where tiles are read."""
    grids: list[Pair]
    margins: Sequence[Tensor | None]
    """For each image ``(2,)``: padded cells on each side; None where there are none."""
    tiles: Sequence[Sequence[ReadTiles]] | None = None
    """For each image and level what reads its tiles; None where views are encoded as a whole."""


def checked_view(model: Any, patch: Patch, inputs: Mapping[str, Any], low_res: Mapping[str, object]) -> View:
    """What the ``hd_*`` inputs show.

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
    given = {name: value for name, value in inputs.items() if name != _TILES}
    wrong = [f"{name} ({type(value).__name__})" for name, value in given.items() if not isinstance(value, Tensor)]
    if wrong:
        raise HighResInputError(f"high-res inputs must be tensors, not {', '.join(wrong)}; use return_tensors='pt'.")
    for name, value in given.items():
        check_readable(name, value)
    view = _of_tiles(model, patch, inputs) if _TILES in inputs else _of_tensors(model, patch, inputs, low_res)
    if not view.grids:
        raise HighResInputError("0 high-res views were given; leave hd_* out of a call without images.")
    patch.geometry.check_low_res(model, low_res, view.grids)
    return view


def _of_tensors(model: Any, patch: Patch, inputs: Mapping[str, Any], low_res: Mapping[str, object]) -> View:
    geometry, zoom = patch.geometry, patch.config.zoom_pair
    if patch.config.levels > 1:
        raise HighResInputError(
            f"the model reads {patch.config.levels} levels of zoom, and {sorted(inputs)} hold one; give the hd_tiles "
            "that a flexkit.FlexProcessor of this model makes, or patch it with levels=1."
        )
    required = [PREFIX + name for name in geometry.inputs]
    missing = [name for name in required if name not in inputs]
    if missing:
        raise HighResInputError(f"high-res inputs lack {missing}; pass all of {required}.")
    views = _declared_views(model, patch, inputs, low_res)
    grids = geometry.grids(model, views, zoom)
    margins = _margins(None if "image_sizes" in views else inputs.get("hd_image_sizes"), grids)
    tiles = geometry.cut(views, zoom) if patch.config.tiles == "on_demand" else None
    for own in tiles or ():
        if any(len(each) != zoom[0] * zoom[1] for each in own):
            raise HighResInputError(
                f"{type(geometry).__name__}.cut gave {[len(each) for each in own]} tiles of an image for "
                f"{geometry.inputs}; a zoom of {zoom} has {zoom[0] * zoom[1]}."
            )
    return View(views, grids, margins, None if tiles is None else [[partial(_taken, own)] for own in tiles])


def _declared_views(
    model: Any, patch: Patch, inputs: Mapping[str, Any], low_res: Mapping[str, object]
) -> dict[str, Tensor]:
    """The inputs of the geometry, found to be what it declares, without the prefix of their names."""
    geometry = patch.geometry
    views: dict[str, Tensor] = {name: inputs[PREFIX + name] for name in geometry.inputs}
    first = geometry.inputs[0]
    if views[first].shape[:1] == (0,):
        raise HighResInputError(f"{PREFIX}{first} holds 0 high-res views; leave hd_* out of a call without images.")
    declared, known = geometry.declared(model, patch.config.zoom_pair), dict[str, int]()
    own = {name: low_res.get(name) for name in views}
    own[first] = next((low_res[name] for name in geometry.pixels if low_res.get(name) is not None), None)
    for name in geometry.inputs:
        if name in declared:
            declared[name].check_axes(PREFIX + name, views[name], known, own[name])
            views[name] = declared[name].checked(PREFIX + name, views[name], own[name])
    return views


def _taken(tiles: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    return [views[index] for views in tiles]


def _of_tiles(model: Any, patch: Patch, inputs: Mapping[str, Any]) -> View:
    grid = patch.geometry.tile_grid(model)
    if grid is None:
        raise HighResInputError(
            f"{type(model).__name__} encodes a high-res view as a whole and takes no hd_tiles; pass "
            f"{[PREFIX + name for name in patch.geometry.inputs]}."
        )
    views, zooms = inputs[_TILES], pyramid(patch.config.zoom_pair, patch.config.levels)
    if not isinstance(views, list | tuple):
        views = [views]
    for view in views:
        if not isinstance(view, TileView) or tuple(view.zooms) != zooms:
            given = f"zooms {tuple(view.zooms)}" if isinstance(view, TileView) else f"a {type(view).__name__}"
            raise HighResInputError(
                f"hd_tiles holds {given}; expected one flexkit.TileView with zooms {zooms} for each image: prepare the "
                "images with a flexkit.FlexProcessor of this model."
            )
    grids = [grid] * len(views)
    like = model.device, model.dtype
    tiles = [[partial(_read, view, level, *like) for level in range(len(zooms))] for view in views]
    return View({}, grids, _margins(inputs.get("hd_image_sizes"), grids), tiles)


def _read(view: TileView, level: int, device: torch.device, dtype: torch.dtype, index: Tensor) -> list[Tensor]:
    return [own.to(device, dtype) for own in view.read(level, index.tolist())]


def _margins(image_sizes: Tensor | None, grids: Sequence[Pair]) -> list[Tensor | None]:
    if image_sizes is None:
        return [None] * len(grids)
    if image_sizes.shape != (len(grids), 2):
        raise HighResInputError(
            f"hd_image_sizes has shape {tuple(image_sizes.shape)}; expected ({len(grids)}, 2): the (height, width) "
            "of each original image."
        )
    margins = [margin_cells(size[None].cpu(), grid)[0] for size, grid in zip(image_sizes, grids, strict=True)]
    return [each if each.any() else None for each in margins]
