"""The seam into transformers: one attention function, which calls the model's own and then flexkit.

It serves a second end, too. K' and V' are what an attention module hands its kernel for high-res features: the module
itself is run, up to that function, as a twin that shares everything but the projections. So its head layout, norms of
keys, rotation, latents and biases are its own, whatever its kind.
"""

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flexkit.attention.kernels import Listening, with_normaliser
from flexkit.checks import FLOATS
from flexkit.patching.seam.config_view import CALL, NAME
from flexkit.patching.seam.projections import ADDED, SUFFIX

__all__ = ["Silent", "apart", "captured", "map_tables", "modeling_module", "reached", "together", "twin_of"]

_QUERIES = ("q_proj", "query", "q", "q_attn")


class Silent:
    """What an attention function asks of a call, where no row reads but by the kernel itself."""

    def asks_of(self, layer: int) -> tuple[bool, bool]:
        """Whether rows select by the map of a layer, and whether they read in it."""
        return False, False

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: object, base: Tensor, **_: Any
    ) -> Tensor:
        """What the kernel gave."""
        return base


class _Captured(Exception):  # noqa: N818 - not an error: it ends a twin's run where the kernel would begin
    """Keys and values of a twin, its arguments."""


def _high_res_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a patched module: the model's own kernel, then the querying rows of a call."""
    call = kwargs.pop(CALL, None)
    if call is _Captured:
        raise _Captured(key, value)
    # The model's own kernel is what its config names now: sdpa, eager, a flash kernel.
    modeling = modeling_module(module)
    config: Any = module.config
    name = config.viewed._attn_implementation
    # Eager attention hides what its mask hides, and nothing without one.
    is_causal = name != "eager" and kwargs.get("is_causal", getattr(module, "is_causal", True))
    if call is not None and call.own is not None:
        name, key, value, attention_mask = call.sees(
            config.layer,
            name,
            key,
            value,
            attention_mask,
            queries=query.shape[2],
            is_causal=is_causal,
            sliding_window=kwargs.get("sliding_window"),
        )
    kernel = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(name, getattr(modeling, "eager_attention_forward", None))
    given, options = (module, query, key, value, attention_mask), {"dropout": dropout, "scaling": scaling, **kwargs}
    normaliser = None
    if call is None or name != "sdpa" or torch.compiler.is_compiling() or not any(call.asks_of(config.layer)):
        output, weights = kernel(*given, **options)
    else:
        output, weights, normaliser = _heard(kernel, *given, **options)
    if call is not None:
        output = call.attend(
            config.layer,
            query,
            key,
            value,
            attention_mask,
            output,
            scaling=scaling,
            # Early versions of transformers let sdpa, which has no cap, compute without it.
            softcap=None if name == "sdpa" else kwargs.get("softcap"),
            sinks=kwargs.get("s_aux", kwargs.get("sinks")),
            position_bias=kwargs.get("position_bias"),
            normaliser=normaliser,
            is_causal=is_causal,
            sliding_window=kwargs.get("sliding_window"),
            dropout=dropout,
        )
    if module.training:
        output = reached(module, output)
    return output, weights


def _heard(
    kernel: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What an attention function gives that asks ``scaled_dot_product_attention``, and that one's log-normaliser."""
    is_token = mask is None and query.shape[1:3] == (key.shape[1], 1) and kwargs.get("position_bias") is None
    if is_token and kernel is sdpa_attention_forward:  # it hands these on as they are: nobody has to overhear it
        found = with_normaliser(query, key, value, dropout_p=dropout, scale=scaling)
        if found is not None:
            return found[0].transpose(1, 2).contiguous(), None, found[1]
    with Listening() as listening:
        output, weights = kernel(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    return output, weights, listening.normaliser


AttentionInterface.register(NAME, _high_res_attention)


def modeling_module(module: nn.Module) -> ModuleType:
    """The ``modeling_*.py`` file that defines a module's class, or the class that FSDP2 or a user derived it from."""
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    return next(file for file in files if hasattr(file, "ALL_ATTENTION_FUNCTIONS"))


def reached(attention: nn.Module, output: Tensor) -> Tensor:
    """The same output, from which a gradient, if only of 0, reaches every added projection.

    A batch that reads no high-res token can then be trained on like any other: its loss has a gradient, and
    DistributedDataParallel waits for no parameter in vain.
    """
    for name in ADDED:
        for parameter in getattr(attention, name, nn.Module()).parameters():
            if parameter.requires_grad:
                own: Any = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                output = output + own.flatten()[:0].sum()
    return output


def captured(twin: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Keys and values that a twin hands its kernel."""
    try:
        type(twin).forward(twin, **arguments, **{CALL: _Captured})
    except _Captured as found:
        key, value = found.args
        return key, value
    raise RuntimeError(f"{type(twin).__name__} ran without calling its kernel.")


def apart(attention: nn.Module, features: Tensor) -> Tensor:
    """Features ``(batch, tokens, dim)`` as ``(batch * tokens, 1, dim)``, for the projections added to ``attention``.

    Each token is a sequence of its own: high-res tokens are a set, whatever a module does along a sequence. And the
    added projections may be kept in more exact numbers than the model, for training.
    """
    added = (attention.get_submodule(name) for name in ADDED if name in attention._modules)
    dtype = next(parameter.dtype for projection in added for parameter in projection.parameters())
    return rearrange(features, "b n d -> (b n) 1 d").to(dtype if dtype in FLOATS else features.dtype)


def together(part: Tensor, batch: int) -> Tensor:
    """Keys or values ``(batch * tokens, key_heads, 1, head_dim)`` as ``(batch, key_heads, tokens, head_dim)``."""
    # Tiles may overflow half precision where the low-res view does not; infinity times a weight of 0 is no 0.
    return rearrange(part, "(b n) h 1 d -> b h n d", b=batch).nan_to_num()


def map_tables(function: Callable[..., Tensor], *tables: Any) -> Any:
    """Apply a function to the tensors that stand in the same place of each of ``tables``, unless these are None."""
    if tables[0] is None or isinstance(tables[0], Tensor):
        return None if tables[0] is None else function(*tables)
    return tuple(map_tables(function, *parts) for parts in zip(*tables, strict=True))


def twin_of(attention: nn.Module, source: nn.Module) -> Any:
    """The source with the added projections of ``attention`` in the place of its own; it shares everything else."""
    modules = dict(source._modules)
    for name in ADDED:
        if name in attention._modules:
            modules[name.removesuffix(SUFFIX)] = attention.get_submodule(name)
    for name in _QUERIES:
        width = getattr(modules.get(name), "out_features", getattr(modules.get(name), "nf", None))
        if isinstance(width, int):
            modules[name] = zeros = _Zeros()
            zeros.width = width
    if modules.get("indexer") is not None:
        modules["indexer"] = _NoIndexer()
    twin: Any = object.__new__(type(source))
    twin.__dict__.update(vars(source), _modules=modules)
    if hasattr(attention, "config"):
        twin.__dict__.update(config=attention.config)
    return twin


class _Zeros(nn.Module):
    """Stands for a projection whose result is not used."""

    width: int

    def forward(self, states: Tensor) -> Tensor:
        # In memory of their own, as a projection's: not every kernel takes an expanded tensor.
        return states.new_zeros(*states.shape[:-1], self.width)


class _NoIndexer(nn.Module):
    """Stands for the part of sparse attention that chooses among base keys."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states.new_zeros(1, 1, 1, dtype=torch.long)

    def build_block_mask(self, blocks: Tensor, mask: Tensor, *args: Any) -> Tensor:
        return mask
