"""What flexkit must know about how a family lays out its image tokens."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
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

    @property
    def default_policy(self) -> Policy:
        """The selection policy where a config names none."""
        return Threshold(48 / 255).pooled(9)

    @abstractmethod
    def check_model(self, model: PreTrainedModel) -> None:
        """Raise :class:`~flexkit.errors.UnsupportedModelError` if the model lacks what this geometry reads."""

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
