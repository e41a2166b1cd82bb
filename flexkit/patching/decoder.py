"""Where the language model of a vision-language model keeps its layers."""

import inspect
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from flexkit.errors import UnsupportedModelError

__all__ = ["DecoderLayer", "find_decoder", "find_layers", "modeling_module", "rotary_embedding"]


@dataclass(frozen=True)
class DecoderLayer:
    """One layer of the language model, as far as patching touches it."""

    index: int
    attention: nn.Module
    input_norm: nn.Module

    @property
    def is_sliding(self) -> bool:
        """Whether the layer sees a window of the sequence only."""
        return getattr(self.attention, "sliding_window", None) is not None


def find_decoder(model: nn.Module) -> nn.Module:
    """The text model inside of ``model``: the module that runs the decoder layers.

    Raises
    ------
    UnsupportedModelError
        If there is none.
    """
    decoder = getattr(getattr(model, "model", model), "language_model", None)
    if not isinstance(decoder, nn.Module) or not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no `model.language_model.layers`: flexkit cannot find its decoder layers."
        )
    return decoder


def find_layers(decoder: nn.Module) -> list[DecoderLayer]:
    """The decoder layers with the attention that can be patched.

    Raises
    ------
    UnsupportedModelError
        If an attention module lacks one of the parts that the method builds on; the message names it.
    """
    return [_layer(index, layer) for index, layer in enumerate(decoder.layers)]  # type: ignore[arg-type]


def modeling_module(module: nn.Module) -> ModuleType:
    """The ``modeling_*.py`` file that defines a module's class."""
    return sys.modules[type(module).__module__]


def rotary_embedding(decoder: nn.Module, layer: DecoderLayer, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables that a layer would get for (possibly fractional) positions.

    Parameters
    ----------
    decoder : torch.nn.Module
        The text model, which owns the rotary module.
    layer : DecoderLayer
        The layer; models with several kinds of layers have tables for each.
    like : torch.Tensor
        Any tensor with the dtype and device wanted.
    positions : torch.Tensor
        ``(axes, batch, length)``.

    Returns
    -------
    cos, sin : torch.Tensor
        Each ``(batch, length, rotated width)``.
    """
    rotary: Any = decoder.rotary_emb
    options = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        options["layer_type"] = layer.attention.layer_type
    cos, sin = rotary(like, positions if positions.shape[0] > 1 else positions[0], **options)
    return cos, sin


def _layer(index: int, layer: nn.Module) -> DecoderLayer:
    attention = getattr(layer, "self_attn", None)
    norm = getattr(layer, "input_layernorm", None)
    parts = {
        "self_attn": attention,
        "self_attn.k_proj": getattr(attention, "k_proj", None),
        "self_attn.v_proj": getattr(attention, "v_proj", None),
        "input_layernorm": norm,
    }
    missing = [name for name, part in parts.items() if not isinstance(part, nn.Module)]
    if missing or attention is None or norm is None:
        raise UnsupportedModelError(f"decoder layer {index} ({type(layer).__name__}) lacks {', '.join(missing)}.")
    if not hasattr(modeling_module(attention), "ALL_ATTENTION_FUNCTIONS"):
        raise UnsupportedModelError(
            f"{type(attention).__name__} does not take its attention from transformers' AttentionInterface, "
            "where flexkit reads the queries and keys."
        )
    return DecoderLayer(index, attention, norm)
