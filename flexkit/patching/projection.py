"""K' and V' of high-res tokens: what an attention module hands its kernel for them, through projections of their own.

The module itself is run, up to its kernel, as a twin that shares everything but the projections. So its head layout,
norms of keys, rotation, latents and biases are its own, whatever its kind.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flexkit.patching.config_view import CALL
from flexkit.patching.copies import floating_dtype, trainable_copy

__all__ = [
    "ADDED",
    "Captured",
    "add_projections",
    "apart",
    "captured",
    "own_projections",
    "project",
    "reached",
    "remove_projections",
    "together",
    "twin_of",
]

_GROUPS = (
    ("k_proj", "v_proj"),
    ("kv_a_proj_with_mqa", "kv_b_proj"),
    ("query_key_value",),
    ("key", "value"),
    ("k", "v"),
    ("c_attn",),
)
_QUERIES = ("q_proj", "query", "q", "q_attn")
_SUFFIX = "_hd"
ADDED = tuple(name + _SUFFIX for group in _GROUPS for name in group)
"""Names of the projections that patching may add to an attention module."""


class Captured(Exception):  # noqa: N818 - not an error: it ends a twin's run where the kernel would begin
    """Keys and values of a twin."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value


class _Zeros(nn.Module):
    """Stands for a projection whose result is not used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, states: Tensor) -> Tensor:
        # In memory of their own, as a projection's: not every kernel takes an expanded tensor.
        return states.new_zeros(*states.shape[:-1], self.width)


class _NoIndexer(nn.Module):
    """Stands for the part of sparse attention that chooses among base keys."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states.new_zeros(1, 1, 1, dtype=torch.long)

    def build_block_mask(self, blocks: Tensor, mask: Tensor, *args: Any) -> Tensor:
        return mask


def own_projections(attention: nn.Module) -> tuple[str, ...]:
    """Names of the submodules that make keys and values of hidden states; empty if there are none."""
    for group in _GROUPS:
        found = tuple(name for name in group if isinstance(getattr(attention, name, None), nn.Module))
        if group[0] in found:  # values may be made of the keys
            return found
    return ()


def add_projections(attention: nn.Module, source: nn.Module, dtype: torch.dtype) -> None:
    """Add trainable copies of the projections of ``source``: the module itself, or the one whose keys it shares.

    Of shared latents, a module may still make its own keys and values. Copies of quantised projections are in
    ``dtype``.
    """
    for name in own_projections(source):
        projection = getattr(attention, name, None) or getattr(source, name)
        setattr(attention, name + _SUFFIX, trainable_copy(projection, dtype))


def remove_projections(attention: nn.Module) -> None:
    """Take the added projections away again."""
    for name in ADDED:
        if hasattr(attention, name):
            delattr(attention, name)


def reached(attention: nn.Module, output: Tensor) -> Tensor:
    """The same output, from which a gradient, if only of 0, reaches every added projection.

    A batch that reads no high-res token can then be trained on like any other: its loss has a gradient, and
    DistributedDataParallel waits for no parameter in vain.
    """
    for name in ADDED:
        for parameter in getattr(attention, name, nn.Module()).parameters():
            if parameter.requires_grad:
                output = output + parameter.flatten()[:0].sum()
    return output


def project(attention: nn.Module, source: nn.Module, features: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
    """K' = RoPE(W'_K F) and V' = W'_V F, in the head layout of the attention module (paper, section 3.2).

    Parameters
    ----------
    attention : torch.nn.Module
        A patched attention module.
    source : torch.nn.Module
        The module whose keys it attends to: itself, unless layers share keys.
    features : torch.Tensor
        ``(batch, tokens, dim)``.
    tables : tuple of torch.Tensor or torch.Tensor or None
        Position embeddings of the tokens, as the model gives them to its attention.

    Returns
    -------
    key, value : torch.Tensor
        ``(batch, key_heads, tokens, head_dim)``; values may have another width.
    """
    batch, states = len(features), apart(attention, source, features)
    known = {
        "hidden_states": states,
        "key_hidden_states": states,
        "value_hidden_states": states,
        "position_embeddings": _as_sequences(tables),
        "position_ids": torch.zeros(len(states), 1, dtype=torch.long, device=states.device),
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=states.device),
        "shared_kv_states": {},
        "prev_topk_indices": torch.zeros(1, 1, 1, dtype=torch.long, device=states.device),
    }
    # What else a module asks for serves its queries or its kernel, which are not reached.
    accepted = inspect.signature(type(source).forward).parameters
    arguments = {name: value for name, value in known.items() if name in accepted or name == "position_ids"}
    key, value = captured(twin_of(attention, source), arguments)
    return together(key, batch), together(value, batch)


def captured(twin: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Keys and values that a twin hands its kernel."""
    try:
        type(twin).forward(twin, **arguments, **{CALL: Captured})
    except Captured as found:
        return found.key, found.value
    raise RuntimeError(f"{type(twin).__name__} ran without calling its kernel.")


def apart(attention: nn.Module, source: nn.Module, features: Tensor) -> Tensor:
    """Features ``(batch, tokens, dim)`` as ``(batch * tokens, 1, dim)``, for the projections added to ``attention``.

    Each token is a sequence of its own: high-res tokens are a set, whatever a module does along a sequence. And the
    added projections may be kept in more exact numbers than the model, for training.
    """
    added = (attention.get_submodule(name + _SUFFIX) for name in own_projections(source))
    dtype = next(map(floating_dtype, added), None)
    return rearrange(features, "b n d -> (b n) 1 d").to(dtype or features.dtype)


def together(part: Tensor, batch: int) -> Tensor:
    """Keys or values ``(batch * tokens, key_heads, 1, head_dim)`` as ``(batch, key_heads, tokens, head_dim)``."""
    # Tiles may overflow half precision where the low-res view does not; infinity times a weight of 0 is no 0.
    return rearrange(part, "(b n) h 1 d -> b h n d", b=batch).nan_to_num()


def _as_sequences(tables: Any) -> Any:
    """Tables ``(..., batch, tokens, width)`` as ``(..., batch * tokens, 1, width)``."""
    if isinstance(tables, tuple):
        return tuple(_as_sequences(table) for table in tables)
    return tables if tables is None else rearrange(tables, "... b n d -> ... (b n) 1 d")


def twin_of(attention: nn.Module, source: nn.Module) -> Any:
    """The source with the added projections of ``attention`` in the place of its own; it shares everything else."""
    modules = dict(source._modules)
    for name in own_projections(source):
        modules[name] = attention.get_submodule(name + _SUFFIX)
    for name in _QUERIES:
        width = getattr(modules.get(name), "out_features", getattr(modules.get(name), "nf", None))
        if isinstance(width, int):
            modules[name] = _Zeros(width)
    if modules.get("indexer") is not None:
        modules["indexer"] = _NoIndexer()
    twin: Any = object.__new__(type(source))
    twin.__dict__.update(vars(source), _modules=modules)
    if hasattr(attention, "config"):
        twin.__dict__.update(config=attention.config)
    return twin
