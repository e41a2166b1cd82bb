"""Where the language model of a vision-language model keeps its layers, and what of them can be patched."""

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from flexkit.errors import UnsupportedModelError
from flexkit.patching.projection import own_projections, project

__all__ = ["DecoderLayer", "find_decoder", "find_layers", "modeling_module", "rotary_embedding", "rotary_module"]

_NORMS = ("input_layernorm", "k_input_layernorm", "operator_norm", "norm", "self_attn_layer_norm")


@dataclass(frozen=True)
class DecoderLayer:
    """One layer of the language model, as far as patching touches it."""

    index: int
    attention: nn.Module
    source: nn.Module
    """The attention module whose keys and values this layer attends to: its own, unless layers share them."""
    input_norm: nn.Module | None
    kind: str | None
    """What the config calls this kind of layer, where there are several."""

    @property
    def has_own_code(self) -> bool:
        """Whether its attention computes in code of its own, not by transformers' AttentionInterface."""
        return False

    @property
    def is_rotated(self) -> bool:
        """Whether its attention takes position embeddings for its keys."""
        return "position_embeddings" in inspect.signature(type(self.source).forward).parameters

    @property
    def is_windowed(self) -> bool:
        """Whether the layer sees a part of the sequence only."""
        named = self.kind is not None and self.kind.startswith(("sliding", "chunked"))
        return named or getattr(self.attention, "sliding_window", None) is not None

    @property
    def is_sparse(self) -> bool:
        """Whether an indexer chooses the keys that a position sees."""
        return hasattr(self.attention, "indexer") and not self.is_windowed

    @property
    def keeps_prompt(self) -> bool:
        """Whether the cache holds the prompt and a window of what was decoded since (Unlimited-OCR)."""
        return self.kind == "reference_sliding_attention"

    def first_key(self, end: int | Tensor, keys: int) -> int | Tensor:
        """Column of the first of its keys, where the sequence ends at ``end``."""
        left = 0 if self.keeps_prompt else end - keys
        return left.clamp_min(0) if isinstance(left, Tensor) else max(0, left)

    def project(self, features: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
        """K' and V' of features ``(batch, tokens, dim)`` with these position embeddings."""
        return project(self.attention, self.source, features, tables)


def find_decoder(model: Any) -> nn.Module:
    """The text model inside of ``model``: the module that runs the decoder layers.

    Raises
    ------
    UnsupportedModelError
        If there is none.
    """
    module = model.get_decoder() if hasattr(model, "get_decoder") else model
    while isinstance(module, nn.Module) and not isinstance(getattr(module, "layers", None), nn.ModuleList):
        module = getattr(module, "model", getattr(module, "decoder", None))
    if not isinstance(module, nn.Module):
        raise UnsupportedModelError(
            f"flexkit cannot find the decoder layers of {type(model).__name__}: its `get_decoder()` leads to no "
            "`layers`."
        )
    return module


def find_layers(decoder: nn.Module) -> list[DecoderLayer]:
    """The decoder layers with attention, in order; those without (linear attention, convolution, Mamba) are left out.

    Raises
    ------
    UnsupportedModelError
        If no layer has attention that can be patched.
    """
    kinds = getattr(getattr(decoder, "config", None), "layer_types", None)
    found: list[DecoderLayer] = []
    for index, layer in enumerate(decoder.layers):  # type: ignore[arg-type]
        attention = next(_attentions(layer), None)
        if attention is None:
            continue
        source = attention
        if not own_projections(attention):  # keys and values come from the last layer of its kind that has its own
            source = next((o.attention for o in reversed(found) if _share(o.source, attention)), attention)
        norm = next((norm for name in _NORMS if isinstance(norm := getattr(layer, name, None), nn.Module)), None)
        if getattr(layer, "norm_after", False):  # the norm of that name stands behind the attention
            norm = None
        if own_projections(source):
            found.append(DecoderLayer(index, attention, source, norm, kinds[index] if kinds else None))
    if not found:
        raise UnsupportedModelError(
            f"no layer of {type(decoder).__name__} has attention that takes its kernel from transformers' "
            "AttentionInterface and projects keys and values by submodules of its own: flexkit has no place to read in."
        )
    return found


def modeling_module(module: nn.Module) -> ModuleType:
    """The ``modeling_*.py`` file that defines a module's class, or the class that FSDP2 or a user derived it from."""
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    return next(file for file in files if hasattr(file, "ALL_ATTENTION_FUNCTIONS"))


def rotary_embedding(decoder: nn.Module, layer: DecoderLayer, like: Tensor, positions: Tensor) -> Any:
    """Position embeddings that a layer would get for (possibly fractional) positions.

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
    tuple of torch.Tensor or torch.Tensor or None
        Cosine and sine tables, each ``(batch, length, width)``, or a complex one; None if the layer rotates nothing.
    """
    rotary = rotary_module(decoder, layer)
    if rotary is None:
        return None
    options = {"layer_type": layer.kind} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
    if len(positions) == 1:  # text models repeat them for rotary modules that take three axes
        positions = positions.expand(3, -1, -1) if hasattr(rotary, "mrope_section") else positions[0]
    return rotary(like, positions, **options)


def rotary_module(decoder: nn.Module, layer: DecoderLayer) -> Any:
    """What makes the position embeddings of a layer; None if it rotates nothing."""
    if not layer.is_rotated:
        return None
    rotary: Any = getattr(decoder, "rotary_emb", None)
    kinds = getattr(decoder, "rope_types", None)  # some layers may rotate by a second module (Molmo2)
    if kinds:
        rotary = getattr(decoder, f"rotary_emb_{kinds[layer.index]}", rotary)
    bases = getattr(decoder.config, "layer_rope_theta", None)  # a layer with base 0 rotates nothing (Muse)
    return None if bases and not bases[layer.index] else rotary


def _attentions(layer: nn.Module) -> Iterator[nn.Module]:
    for child in layer.children():
        attends = own_projections(child) or getattr(child, "is_kv_shared_layer", False)
        if attends and _takes_kernel_from_interface(type(child)):
            yield child


def _takes_kernel_from_interface(kind: type) -> bool:
    """Whether a module's code asks transformers' AttentionInterface for its kernel; linear attention does not."""
    functions = (inspect.unwrap(function) for _, function in inspect.getmembers(kind, inspect.isfunction))
    return any("ALL_ATTENTION_FUNCTIONS" in function.__code__.co_names for function in functions)


def _share(earlier: nn.Module, attention: nn.Module) -> bool:
    alike = (getattr(earlier, name, None) == getattr(attention, name, None) for name in ("layer_type", "use_rope"))
    return type(earlier) is type(attention) and all(alike)
