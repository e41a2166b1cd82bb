"""The seam into transformers: one attention function, registered once, that calls the model's own."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from flexkit.patching.decoder import modeling_module

__all__ = ["CALL", "ConfigView"]

NAME = "flexkit"
CALL = "flexkit_call"
"""Name of the keyword argument that carries a :class:`~flexkit.patching.call.FlexCall` through the model."""


class ConfigView:
    """A model's config as its patched attention modules see it: the same, but for the attention function.

    Each patched module gets a view of its own in place of its config, so the config itself, which other modules, other
    models and the masks depend on, is never touched, and a later change of it is seen here.
    """

    _attn_implementation = NAME

    def __init__(self, config: Any) -> None:
        self.__dict__["viewed"] = config

    def __getattr__(self, name: str) -> Any:
        # Dunder names are looked up by copy and pickle before there is anything to view.
        if name.startswith("__") or "viewed" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.viewed, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.viewed, name, value)


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
    # The model's own kernel is what its config names now: sdpa, eager, a flash kernel.
    modeling = modeling_module(module)
    config: Any = module.config
    kernel = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(
        config.viewed._attn_implementation, getattr(modeling, "eager_attention_forward", None)
    )
    output, weights = kernel(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if call is not None:
        output = call.attend(
            module.layer_idx,
            query,
            key,
            value,
            attention_mask,
            output,
            scaling=scaling,
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
            is_causal=kwargs.get("is_causal", getattr(module, "is_causal", True)),
            sliding_window=kwargs.get("sliding_window"),
            dropout=dropout,
        )
    return output, weights


AttentionInterface.register(NAME, _high_res_attention)
