"""Where the language model of a vision-language model keeps its layers, and what of them can be patched."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from types import CodeType
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from flexkit.errors import UnsupportedModelError
from flexkit.grids import Grid, fractional_positions, interpolate_table
from flexkit.patching.seam.attention import apart, captured, map_tables, together, twin_of
from flexkit.patching.seam.projections import own_projections
from flexkit.patching.seam.tensor_parallel import HeadShare

__all__ = ["DecoderLayer", "embeddings_of", "find_decoder", "find_layers", "high_res_rotary", "rotary_embedding"]

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

    value_norm: nn.Module | None = None
    """That of what values are made of, if it has one of its own."""
    is_rotated: bool = False
    """Whether its attention takes position embeddings for its keys."""
    rotary: str | None = None
    """The module of the text model that makes them; None if nothing is rotated."""
    is_sparse: bool = False
    """Whether an indexer chooses the keys that a position sees."""
    keeps_prompt: bool = False
    """Whether the cache holds the prompt and a window of what was decoded since (Unlimited-OCR)."""
    has_own_code: bool = False
    """Whether its attention computes in code of its own, not by transformers' AttentionInterface."""
    share: HeadShare | None = None
    """How it is shared out among processes; None if this one has all of it."""

    @property
    def is_windowed(self) -> bool:
        """Whether the layer sees a part of the sequence only."""
        return _is_windowed(self.attention, self.kind)

    def first_key(self, end: int | Tensor, keys: int) -> int | Tensor:
        """Column of the first of its keys, where the sequence ends at ``end``."""
        left = 0 if self.keeps_prompt else end - keys
        return left.clamp_min(0) if isinstance(left, Tensor) else max(0, left)

    def project(self, features: Tensor, tables: Any, *, normed: bool = False) -> tuple[Tensor, Tensor]:
        """K' = RoPE(W'_K F) and V' = W'_V F, in the head layout of the attention module (paper, section 3.2).

        Parameters
        ----------
        features : torch.Tensor
            ``(batch, tokens, dim)``.
        tables : tuple of torch.Tensor or torch.Tensor or None
            Position embeddings of the tokens, as the model gives them to its attention.
        normed : bool
            Whether the features pass the norm in front of the attention first.

        Returns
        -------
        key, value : torch.Tensor
            ``(batch, key_heads, tokens, head_dim)``; values may have another width.
        """
        batch, key_norm = len(features), self.input_norm if normed else None
        states = apart(self.attention, features if key_norm is None else key_norm(features))
        own = self.value_norm if normed else None
        values = states if own is None else apart(self.attention, own(features))
        known = {
            "hidden_states": states,
            "key_hidden_states": states,
            "value_hidden_states": values,
            "position_embeddings": map_tables(lambda table: rearrange(table, "... b n d -> ... (b n) 1 d"), tables),
            "position_ids": torch.zeros(len(states), 1, dtype=torch.long, device=states.device),
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=states.device),
            "shared_kv_states": {},
            "prev_topk_indices": torch.zeros(1, 1, 1, dtype=torch.long, device=states.device),
        }
        # What else a module asks for serves its queries or its kernel, which are not reached.
        accepted = _accepted(type(self.source).forward)
        arguments = {name: value for name, value in known.items() if name in accepted or name == "position_ids"}
        key, value = captured(twin_of(self.attention, self.source), arguments)
        return together(key, batch), together(value, batch)


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


def embeddings_of(model: Any, decoder: nn.Module, features: Tensor, valid: Tensor) -> dict[str, Any]:
    """Image features as the text model takes them.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The whole model.
    decoder : torch.nn.Module
        Its text model.
    features : torch.Tensor
        ``(batch, tokens, parts * dim)``: what enters it, and what it adds behind some of its layers (deepstack).
    valid : torch.Tensor
        ``(batch, tokens)``, bool: which tokens there are.

    Returns
    -------
    dict
        Arguments of the text model.
    """
    dim = model.get_input_embeddings().embedding_dim
    first, *deeper = rearrange(features, "b n (parts dim) -> parts b n dim", dim=dim)
    arguments: dict[str, Any] = {"inputs_embeds": first / getattr(decoder, "embedding_multiplier", 1.0)}
    if deeper and "deepstack_features" in inspect.signature(decoder.forward).parameters:
        layers = [layer for _, layer in model.config.deepstack_layer_map] + model.config.spatial_target_layers
        arguments["vision_mask"] = valid[..., None]
        arguments["deepstack_features"] = {layer: part[valid] for layer, part in zip(layers, deeper, strict=True)}
    elif deeper:
        arguments["visual_pos_masks"] = valid
        arguments["deepstack_visual_embeds"] = [part[valid] for part in deeper]
    return arguments


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
            kind = kinds[index] if kinds else None
            is_rotated = "position_embeddings" in _accepted(type(source).forward)
            found.append(
                DecoderLayer(
                    index,
                    attention,
                    source,
                    norm,
                    kind,
                    value_norm=getattr(layer, "v_input_layernorm", None),
                    is_rotated=is_rotated,
                    rotary=_rotary(decoder, index) if is_rotated else None,
                    is_sparse=hasattr(attention, "indexer") and not _is_windowed(attention, kind),
                    keeps_prompt=kind == "reference_sliding_attention",
                )
            )
    if not found:
        raise UnsupportedModelError(
            f"no layer of {type(decoder).__name__} has attention that takes its kernel from transformers' "
            "AttentionInterface and projects keys and values by submodules of its own: flexkit has no place to read in."
        )
    return found


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
    if layer.rotary is None:
        return None
    rotary: Any = getattr(decoder, layer.rotary)
    # A signature takes as long to make as the tables of a layer.
    named = "layer_type" in inspect.unwrap(type(rotary).forward).__code__.co_varnames
    options = {"layer_type": layer.kind} if named else {}
    if len(positions) == 1:  # text models repeat them for rotary modules that take three axes
        positions = positions.expand(3, -1, -1) if hasattr(rotary, "mrope_section") else positions[0]
    return rotary(like, positions, **options)


@torch.no_grad()
def high_res_rotary(
    decoder: nn.Module,
    layer: DecoderLayer,
    like: Tensor,
    positions: Tensor | None,
    grid: Grid,
    zoom: Grid,
    kind: Literal["interpolated", "fractional"],
    tokens: Tensor | None = None,
) -> Any:
    """Position embeddings of high-res tokens of images, as a layer takes them; None if it rotates nothing.

    Parameters
    ----------
    decoder, layer, like
        As for :func:`rotary_embedding`.
    positions : torch.Tensor
        ``(axes, images, cells)``: of the low-res tokens; None where they are unknown.
    grid, zoom : tuple of int
        [Frames,] rows and columns of these, and high-res tokens along each.
    kind : {"interpolated", "fractional"}
        How high-res tokens lie between them.
    tokens : torch.Tensor, optional
        ``(tokens,)``, int64: those that are wanted, in raster order; None for all.
    """
    if positions is None:
        if not layer.is_rotated:
            return None
        raise RuntimeError("the rotary positions of an image are unknown: the text model ran without its hook.")
    if kind == "fractional":
        positions = fractional_positions(positions, grid, zoom)
        if tokens is None:
            return rotary_embedding(decoder, layer, like, positions)
        # Frequencies may follow the largest position: with the last one they are those of the whole image.
        wanted = torch.cat([positions[..., tokens], positions[..., -1:]], dim=-1)
        return map_tables(lambda table: table[..., :-1, :], rotary_embedding(decoder, layer, like, wanted))

    finer = partial(interpolate_table, grid=grid, zoom=zoom, tokens=tokens)
    return map_tables(finer, rotary_embedding(decoder, layer, like, positions))


def _rotary(decoder: Any, index: int) -> str | None:
    """The name of the module that rotates for a layer; None if none does."""
    bases = getattr(decoder.config, "layer_rope_theta", None)  # a layer with base 0 rotates nothing (Muse)
    if bases and not bases[index]:
        return None
    kinds = getattr(decoder, "rope_types", None)  # some layers may rotate by a second module (Molmo2)
    names = [f"rotary_emb_{kinds[index]}"] if kinds else []
    return next((name for name in (*names, "rotary_emb") if getattr(decoder, name, None) is not None), None)


@cache
def _accepted(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of what the modules of a class take."""
    code: CodeType = inspect.unwrap(forward).__code__
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _is_windowed(attention: nn.Module, kind: str | None) -> bool:
    named = kind is not None and kind.startswith(("sliding", "chunked"))
    return named or getattr(attention, "sliding_window", None) is not None


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
