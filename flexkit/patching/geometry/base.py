"""What flexkit must know about how a family lays out its image tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.patching.decoder import find_decoder
from flexkit.selection import Policy, Threshold
from flexkit.zoom import Pair

__all__ = ["Geometry"]


class Geometry(ABC):
    """One kind of image-token layout; a family of models names the one it has.

    A geometry holds no state: all it needs of a model it reads from the model.
    """

    inputs: ClassVar[tuple[str, ...]]
    """The arguments of ``get_image_features``; the high-res view has the same ones, prefixed with ``hd_``."""

    default_zoom: ClassVar[int]

    overview_only: str = ""
    """What makes prompts carry overviews only, where a processor cuts images into tiles of its own; for errors."""

    @property
    def default_policy(self) -> Policy:
        """The selection policy where a config names none."""
        return Threshold(48 / 255).pooled(9)

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise :class:`~flexkit.errors.UnsupportedModelError` if the model lacks what this geometry reads."""
        return

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

    def check_low_res(self, model: PreTrainedModel, inputs: Mapping[str, object], grids: Sequence[Pair]) -> None:
        """Raise :class:`~flexkit.errors.HighResInputError` if the base model's inputs contradict the high-res view."""
        return

    def image_tokens(self, model: PreTrainedModel, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """``(batch, length)``, bool: the positions that hold image tokens."""
        token = model.config.image_token_id
        if input_ids is not None:
            return input_ids.eq(token)
        if inputs_embeds is None:
            raise HighResInputError("high-res inputs came with neither input_ids nor inputs_embeds.")
        embed = model.get_input_embeddings()
        placeholder = embed(torch.tensor(token, device=inputs_embeds.device))
        same: Tensor = inputs_embeds == placeholder.to(inputs_embeds.dtype)
        return same.all(-1)
