"""The seam into transformers: one attention function, registered once, that calls the model's own."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from flexkit.patching.config_view import CALL, NAME, ConfigView, SparseConfigView
from flexkit.patching.decoder import DecoderLayer, modeling_module
from flexkit.patching.projection import Captured, reached

__all__ = ["divert", "restore"]


def divert(layer: DecoderLayer) -> None:
    """Let the attention of a layer run through flexkit."""
    attention: Any = layer.attention
    if not layer.has_own_code:
        view = SparseConfigView if hasattr(attention, "indexer") else ConfigView
        attention.config = view(attention.config, layer.index)


def restore(layer: DecoderLayer) -> None:
    """Give the attention of a layer its own config back, if it was taken."""
    attention: Any = layer.attention
    if isinstance(getattr(attention, "config", None), ConfigView):
        attention.config = attention.config.viewed


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
    if call is Captured:
        raise Captured(key, value)
    # The model's own kernel is what its config names now: sdpa, eager, a flash kernel.
    modeling = modeling_module(module)
    config: Any = module.config
    name = config.viewed._attn_implementation
    kernel = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(name, getattr(modeling, "eager_attention_forward", None))
    output, weights = kernel(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if call is not None:
        output = call.attend(
            config.layer,
            query,
            key,
            value,
            attention_mask,
            output,
            scaling=scaling,
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux", kwargs.get("sinks")),
            position_bias=kwargs.get("position_bias"),
            # Eager attention hides what its mask hides, and nothing without one.
            is_causal=name != "eager" and kwargs.get("is_causal", getattr(module, "is_causal", True)),
            sliding_window=kwargs.get("sliding_window"),
            dropout=dropout,
        )
    if module.training:
        output = reached(module, output)
    return output, weights


AttentionInterface.register(NAME, _high_res_attention)
