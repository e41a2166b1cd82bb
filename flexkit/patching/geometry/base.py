"""What flexkit must know about how a family lays out its image tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError, UnsupportedModelError
from flexkit.grids import Pair
from flexkit.patching.call import FlexCall
from flexkit.patching.config import FlexConfig
from flexkit.patching.config_view import CALL
from flexkit.patching.declared import Declared
from flexkit.patching.decoder import DecoderLayer, find_decoder, find_layers
from flexkit.patching.features import no_tiles
from flexkit.patching.in_sequence import prepare
from flexkit.patching.state import Patch
from flexkit.selection import PUBLISHED_POLICY, Policy

__all__ = ["Geometry"]


class Geometry(ABC):
    """One kind of image-token layout; a family of models names the one it has.

    A geometry holds no state: all it needs of a model it reads from the model.
    """

    inputs: ClassVar[tuple[str, ...]]
    """The arguments of ``get_image_features``; the high-res view has the same ones, prefixed with ``hd_``."""

    default_zoom: ClassVar[int]
    """The zoom where a config names none."""

    overview_only: str = ""
    """What makes prompts carry overviews only, where a processor cuts images into tiles of its own; for errors."""

    @property
    def pixels(self) -> tuple[str, ...]:
        """The arguments of the base model of which one brings new images."""
        return self.inputs[0], "pixel_values_images", "image_patches"

    @property
    def default_policy(self) -> Policy:
        """The selection policy where a config names none."""
        return PUBLISHED_POLICY

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise :class:`~flexkit.errors.UnsupportedModelError` if the model lacks what this geometry reads."""
        return

    def declared(self, model: PreTrainedModel, zoom: Pair) -> Mapping[str, Declared]:
        """Axes and numbers of :attr:`inputs`, checked before :meth:`grids` sees them; others may have any."""
        return {}

    @abstractmethod
    def grids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], zoom: Pair) -> list[Pair]:
        """Low-res ``(rows, columns)`` of every image, read off its high-res view.

        Raises :class:`~flexkit.errors.HighResInputError` if the view is no ``zoom``-fold of anything the model takes.
        """

    @abstractmethod
    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Pair], zoom: Pair
    ) -> list[Tensor]:
        """High-res features of every image, ``(tokens, dim)`` in raster order of its high-res grid."""

    def cut(self, inputs: Mapping[str, Tensor], zoom: Pair) -> list[tuple[Tensor, ...]] | None:
        """The tiles of every image, where they are encoded one by one; None where a view is encoded as a whole.

        Returns
        -------
        list of tuple of torch.Tensor or None
            For each image ``(tiles, channels, height, width)`` in raster order, one for each of :attr:`inputs`.
        """
        return None

    def tile_grid(self, model: PreTrainedModel) -> Pair | None:
        """Rows and columns of the tokens of a tile, where a view is encoded tile by tile; None elsewhere."""
        return None

    def encode_tiles(self, model: PreTrainedModel, tiles: Sequence[Tensor]) -> Tensor:
        """Features ``(tiles, cells, dim)`` of tiles from :meth:`cut`, one tensor for each of :attr:`inputs`."""
        return no_tiles(tiles)

    def layout(self, model: PreTrainedModel, grid: Pair) -> Tensor:
        """Which image tokens of an image of this grid are its cells.

        Returns
        -------
        torch.Tensor
            ``(tokens,)``, bool, for the image tokens of one image in the order of the sequence; its True entries are
            the cells in raster order. The others separate rows or images.
        """
        return torch.ones(grid[0] * grid[1], dtype=torch.bool)

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The text model: the module whose ``layers`` are the decoder layers."""
        return find_decoder(model)

    def methods(self, model: PreTrainedModel) -> Iterable[tuple[nn.Module, str, Callable[..., Any]]]:
        """Functions that stand for methods of the model's parts while it is patched: module, name, function."""
        return ()

    single_reader: ClassVar[bool] = False
    """Whether a model may have one layer only, which then reads what it has selected itself."""

    # What follows differs only where attention reads the image beside the decoder's sequence (patching/context).

    def layers(self, model: PreTrainedModel) -> list[DecoderLayer]:
        """The layers whose attention sees the image, in the order in which they run."""
        return find_layers(self.decoder(model))

    def check_config(self, config: FlexConfig) -> None:
        """Raise :class:`~flexkit.errors.ConfigError` if a setting means nothing to models of this kind."""
        return

    def hooks(self, model: PreTrainedModel, layers: Sequence[DecoderLayer]) -> Iterable[RemovableHandle]:
        """Hooks that a model carries while these layers of it are patched, besides those of every patched model.

        Each is registered when it is asked for, so that those that are there can be removed if a later one fails.
        """
        return ()

    def prepare(
        self, model: nn.Module, patch: Patch, high_res: dict[str, Any], inputs: dict[str, Any]
    ) -> FlexCall | None:
        """The call that high-res and base inputs describe together; None if they ask for the base model."""
        return prepare(model, patch, high_res, inputs)

    def run(self, forward: Callable[..., Any], call: FlexCall, inputs: Mapping[str, Any]) -> Any:
        """Run the base model's forward so that its attention gets the call."""
        return forward(**inputs, **{CALL: call})

    def check_low_res(self, model: PreTrainedModel, inputs: Mapping[str, object], grids: Sequence[Pair]) -> None:
        """Raise :class:`~flexkit.errors.HighResInputError` if the base model's inputs contradict the high-res view."""
        return

    def image_tokens(self, model: PreTrainedModel, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """``(batch, length)``, bool: the positions that hold image tokens."""
        token = getattr(model.config, "image_token_id", None)
        if token is None:
            raise UnsupportedModelError(
                f"the config of {type(model).__name__} has no image_token_id; {type(self).__name__} needs a method "
                "image_tokens that says where image tokens stand."
            )
        if input_ids is not None:
            return input_ids.eq(token)
        if inputs_embeds is None:
            raise HighResInputError("high-res inputs came with neither input_ids nor inputs_embeds.")
        embed = model.get_input_embeddings()
        placeholder = embed(torch.tensor(token, device=inputs_embeds.device))
        same: Tensor = inputs_embeds == placeholder.to(inputs_embeds.dtype)
        return same.all(-1)
