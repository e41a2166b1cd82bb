"""What flexkit must know of how a family lays out its image tokens, what their inputs are, and how it encodes them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkit.checks import FLOATS
from flexkit.errors import HighResInputError, UnsupportedModelError
from flexkit.grids import Grid, Pair
from flexkit.patching.memory.tokens import no_tiles
from flexkit.patching.seam.decoder import find_decoder
from flexkit.selection import PUBLISHED_POLICY, Policy

__all__ = [
    "PREFIX",
    "Axis",
    "Declared",
    "Geometry",
    "cells_of_image",
    "check_readable",
    "features_owner",
    "image_features",
]

PREFIX = "hd_"
"""What names of high-res inputs begin with."""

Axis = int | str
"""A size, or a name for any size but 0: the same one in all inputs that have it."""

_SHOWN = 32
"""How many numbers an error shows."""
_WORDS = {"integers": "integers", "sizes": "positive integers", "mask": "a mask of bools"}


@dataclass(frozen=True)
class Declared:
    """Axes and numbers of one input."""

    axes: tuple[Axis | EllipsisType, ...]
    """An ellipsis at the end stands for one axis or more: those of the base model's own input."""
    numbers: Literal["floating", "integers", "sizes", "mask"] = "floating"
    """Sizes are positive integers; a mask is bool, or 0 and 1."""
    meaning: str = ""
    """What the sizes of the axes say, for errors."""
    zoom: Grid = (1, 1)
    """How many times as large as the base model's own the last two of those are."""

    def check_axes(self, name: str, value: Tensor, known: dict[str, int], base: object = None) -> None:
        """Raise :class:`~flexkit.errors.HighResInputError` unless an input has these axes.

        Parameters
        ----------
        name : str
            Of the input.
        value : torch.Tensor
            The input.
        known : dict
            Sizes of the axes that other inputs have named; new ones are added.
        base : object
            The base model's own input of this name, if it is a tensor.
        """
        axes: list[Axis] = [axis for axis in self.axes if isinstance(axis, Axis)]
        if len(axes) < len(self.axes):
            if isinstance(base, Tensor) and base.ndim > len(axes):
                rest = list(base.shape[len(axes) :])
                rest[-2:] = [size * zoom for size, zoom in zip(rest[-2:], self.zoom, strict=False)]
            else:
                rest = list(value.shape[len(axes) :])
            axes += rest or ["..."]
        wanted = [known.get(axis, axis) if isinstance(axis, str) else axis for axis in axes]
        if value.ndim != len(axes) or not all(
            got > 0 and (isinstance(want, str) or got == want) for got, want in zip(value.shape, wanted, strict=True)
        ):
            raise HighResInputError(self._message(name, value, f"({', '.join(map(str, wanted))})"))
        known.update((axis, got) for axis, got in zip(axes, value.shape, strict=True) if isinstance(axis, str))

    def checked(self, name: str, value: Tensor, base: object = None) -> Tensor:
        """The input: integers as int64, floating numbers in the dtype and on the device of the base model's own.

        Raises :class:`~flexkit.errors.HighResInputError` if its numbers are not what is declared.
        """
        if self.numbers == "floating":
            if not value.is_floating_point():
                raise HighResInputError(
                    f"{name} is {value.dtype}; expected floating numbers: normalised pixels, as an image processor "
                    "gives them."
                )
            own = isinstance(base, Tensor) and base.is_floating_point()
            return value.to(base.device, base.dtype) if own else value  # type: ignore[attr-defined]
        fits = not value.is_floating_point() and (value.dtype != torch.bool or self.numbers == "mask")
        if fits and self.numbers == "mask":
            fits = bool(((value == 0) | (value == 1)).all())
        elif fits and self.numbers == "sizes":
            fits = bool((value > 0).all())
        if not fits:
            raise HighResInputError(self._message(name, value))
        return value if self.numbers == "mask" else value.long()

    def _message(self, name: str, value: Tensor, shape: str = "") -> str:
        if self.numbers == "floating":
            meaning = f": {self.meaning}" if self.meaning else ""
            return f"{name} has shape {tuple(value.shape)}; expected {shape}{meaning}."
        given = str(value.tolist()) if value.numel() <= _SHOWN else f"{value.dtype} of shape {tuple(value.shape)}"
        expected = [_WORDS[self.numbers], self.meaning, f"of shape {shape}" if shape else ""]
        return f"{name} is {given}; expected {', '.join(filter(None, expected))}."


def check_readable(name: str, value: Tensor) -> None:
    """Raise :class:`~flexkit.errors.HighResInputError` for a tensor without plain numbers, or with NaN or infinity."""
    is_plain = value.dtype in FLOATS if value.is_floating_point() else not (value.is_complex() or value.is_quantized)
    if not is_plain or value.layout is not torch.strided or value.is_meta:
        raise HighResInputError(
            f"{name} is a tensor of {value.dtype}, {value.layout}, on {value.device}; expected a dense one of plain "
            "numbers, on a device that holds them."
        )
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise HighResInputError(f"{name} holds NaN or infinite values.")


class Geometry(ABC):
    """One kind of layout of image tokens, or of a video's; a family of models names the ones it has.

    A geometry holds no state: all it needs of a model it reads from the model.
    """

    inputs: ClassVar[tuple[str, ...]]
    """The arguments of :attr:`features`; the high-res view has the same ones, prefixed with ``hd_``."""

    features: ClassVar[str] = "get_image_features"
    """The model's method that encodes what :attr:`inputs` show."""

    token: ClassVar[str] = "image_token_id"
    """What configs call the id of the tokens that stand for it."""

    axes: ClassVar[int] = 2
    """2 where a grid has rows and columns, 3 where it has frames, rows and columns."""

    video: "Geometry | None" = None
    """How the same models lay out videos; None if they take none, or flexkit reads none."""

    default_zoom: ClassVar[int]
    """The zoom where a config names none."""

    whole_frames: bool = False
    """Whether :meth:`cut` leaves the frames of a video whole; others are cut into tiles as large as low-res frames."""

    overview_only: str = ""
    """What makes prompts carry overviews only, where a processor cuts images into tiles of its own; for errors."""

    pixels: ClassVar[tuple[str, ...]] = ("pixel_values_images", "image_patches")
    """The arguments of the base model that bring new images in the place of the first of :attr:`inputs`."""

    @property
    def default_policy(self) -> Policy:
        """The selection policy where a config names none."""
        return PUBLISHED_POLICY

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise :class:`~flexkit.errors.UnsupportedModelError` if the model lacks what this geometry reads."""
        return

    def declared(self, model: PreTrainedModel, zoom: Grid) -> Mapping[str, Declared]:
        """Axes and numbers of :attr:`inputs`, checked before :meth:`grids` sees them; others may have any."""
        return {}

    @abstractmethod
    def grids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], zoom: Grid) -> Sequence[Grid]:
        """Low-res ``(rows, columns)`` of every image, or ``(frames, rows, columns)``, read off its high-res view.

        Raises :class:`~flexkit.errors.HighResInputError` if the view is no ``zoom``-fold of anything the model takes.
        """

    @abstractmethod
    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Grid], zoom: Grid
    ) -> list[Tensor]:
        """High-res features of every image, ``(tokens, dim)`` in raster order of its high-res grid."""

    def cut(self, inputs: Mapping[str, Tensor], zoom: Grid) -> list[tuple[Tensor, ...]] | None:
        """The tiles of every image, where they are encoded one by one; None where a view is encoded as a whole.

        Returns
        -------
        list of tuple of torch.Tensor or None
            For each image ``(tiles, ...)`` in raster order, one for each of :attr:`inputs`: ``(tiles, channels, height,
            width)`` of pixels.
        """
        return None

    def tile_grid(self, model: PreTrainedModel) -> Pair | None:
        """Rows and columns of the tokens of a tile, where a view is encoded tile by tile; None elsewhere."""
        return None

    def encode_tiles(self, model: PreTrainedModel, tiles: Sequence[Tensor]) -> Tensor:
        """Features ``(tiles, cells, dim)`` of tiles from :meth:`cut`, one tensor for each of :attr:`inputs`."""
        return no_tiles(tiles)

    def layout(self, model: PreTrainedModel, grid: Grid) -> Tensor:
        """Which image tokens of an image of this grid are its cells.

        Returns
        -------
        torch.Tensor
            ``(tokens,)``, bool, for the image tokens of one image in the order of the sequence; its True entries are
            the cells in raster order. The others separate rows or images.
        """
        return torch.ones(math.prod(grid), dtype=torch.bool)

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The text model: the module whose ``layers`` are the decoder layers."""
        return find_decoder(model)

    def methods(self, model: PreTrainedModel) -> Iterable[tuple[nn.Module, str, Callable[..., Any]]]:
        """Functions that stand for methods of the model's parts while it is patched: module, name, function."""
        return ()

    route: Any = None
    """A ``Route``, by which calls reach the attention that reads; None where images stand in the sequence."""

    def check_low_res(self, model: PreTrainedModel, inputs: Mapping[str, object], grids: Sequence[Grid]) -> None:
        """Raise :class:`~flexkit.errors.HighResInputError` if the base model's inputs contradict the high-res view."""
        return

    def image_tokens(
        self, model: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None, token: str | None = None
    ) -> Tensor:
        """``(batch, length)``, bool: the positions that hold image tokens, or another token that the config names."""
        name = token or self.token
        index = getattr(model.config, name, None)
        if index is None:
            raise UnsupportedModelError(
                f"the config of {type(model).__name__} has no {name}; {type(self).__name__} needs a method "
                "image_tokens that says where image tokens stand."
            )
        if input_ids is not None:
            return input_ids.eq(index)
        if inputs_embeds is None:
            raise HighResInputError("high-res inputs came with neither input_ids nor inputs_embeds.")
        placeholder = model.get_input_embeddings()(torch.tensor(index, device=inputs_embeds.device))
        same: Tensor = inputs_embeds == placeholder.to(inputs_embeds.dtype)
        return same.all(-1)


def image_features(model: PreTrainedModel, by: str = Geometry.features, /, **inputs: Tensor) -> list[Tensor]:
    """Projected features of every image, each ``(tokens, parts * dim)``, as they enter the decoder; without gradient.

    A decoder that scales its embeddings (Granite) scales image features too. Where a model adds features of deeper
    layers of its tower to the image tokens on their way through the decoder (deepstack), these are the other parts.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model with ``get_image_features``.
    by : str
        Another method of it, as ``get_video_features``.
    **inputs : torch.Tensor
        Its arguments.
    """
    with torch.no_grad():
        output = getattr(features_owner(model, by), by)(**inputs, return_dict=True)
    features = getattr(output, "pooler_output", output)
    if features is None:
        features = getattr(output, "last_hidden_state", None)
    scale = getattr(find_decoder(model), "embedding_multiplier", 1.0)
    images = [] if features is None else [image.reshape(-1, image.shape[-1]) for image in features]
    if scale != 1.0:
        images = [image * scale for image in images]
    deeper = [list(_per_image(layer, images)) for layer in getattr(output, "deepstack_features", None) or ()]
    if not images and not deeper:
        raise UnsupportedModelError(f"{type(model).__name__}.{by} gave no features.")
    images = images or [torch.zeros_like(image) for image in deeper[0]]
    if not deeper:
        return images
    return [torch.cat(parts, dim=-1) for parts in zip(images, *deeper, strict=True)]


def cells_of_image(tokens: Tensor, layout: Tensor) -> Tensor:
    """Those of the image tokens ``(..., tokens, dim)`` that a layout marks as cells."""
    (places,) = layout.cpu().numpy().nonzero()  # of the host: nobody waits
    return tokens if len(places) == len(layout) else tokens.index_select(-2, torch.from_numpy(places).to(tokens.device))


def features_owner(model: PreTrainedModel, by: str = Geometry.features) -> Any:
    """The part of a model that has ``get_image_features``, or another method."""
    return model if hasattr(model, by) else getattr(model, "model", model)


def _per_image(layer: Any, images: Sequence[Tensor]) -> Sequence[Tensor]:
    """Features of a deeper layer image by image: in one tensor, in a list, or in a list behind a layer's number."""
    if isinstance(layer, Tensor):
        return torch.split(layer.reshape(-1, layer.shape[-1]), [len(image) for image in images])
    features: Sequence[Tensor] = layer[1] if isinstance(layer[0], int) else layer
    return features
