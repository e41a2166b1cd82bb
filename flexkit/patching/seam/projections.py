"""The projections that patching adds to attention modules: trainable copies of their own, however those are kept."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from flexkit.patching.seam.tensor_parallel import HeadShare

__all__ = [
    "ADDED",
    "SUFFIX",
    "add_projections",
    "floating_dtype",
    "innermost",
    "own_projections",
    "remove_projections",
    "trainable_copy",
]

_GROUPS = (
    ("k_proj", "v_proj"),
    ("kv_a_proj_with_mqa", "kv_b_proj"),
    ("query_key_value",),
    ("key", "value"),
    ("k", "v"),
    ("c_attn",),
)
SUFFIX = "_hd"
"""What names of added projections end with."""
ADDED = tuple(name + SUFFIX for group in _GROUPS for name in group)
"""Names of the projections that patching may add to an attention module."""


def own_projections(attention: nn.Module) -> tuple[str, ...]:
    """Names of the submodules that make keys and values of hidden states; empty if there are none."""
    for group in _GROUPS:
        found = tuple(name for name in group if isinstance(getattr(attention, name, None), nn.Module))
        if group[0] in found:  # values may be made of the keys
            return found
    return ()


def add_projections(
    attention: nn.Module, source: nn.Module, dtype: torch.dtype, share: HeadShare | None = None
) -> None:
    """Add trainable copies of the projections of ``source``: the module itself, or the one whose keys it shares.

    Of shared latents, a module may still make its own keys and values. Copies of quantised projections are in
    ``dtype``; those of projections that are shared out among processes are so, too.
    """
    for name in own_projections(source):
        projection = getattr(attention, name, None) or getattr(source, name)
        copied = trainable_copy(projection, dtype)
        setattr(attention, name + SUFFIX, copied if share is None else share.shared_out(name, copied))


def remove_projections(attention: nn.Module) -> None:
    """Take the added projections away again."""
    for name in ADDED:
        if hasattr(attention, name):
            delattr(attention, name)


def innermost(projection: nn.Module) -> nn.Module:
    """The projection that PEFT has wrapped: the copy that it trains, or the layer beneath an adapter."""
    wrapper: Any = projection
    if hasattr(wrapper, "modules_to_save"):
        active = wrapper.active_adapters
        return wrapper.modules_to_save[active[0]] if active else wrapper.original_module  # type: ignore[no-any-return]
    return wrapper.get_base_layer() if hasattr(wrapper, "get_base_layer") else projection


def trainable_copy(projection: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy that holds its weights, in numbers that have gradients.

    Parameters
    ----------
    projection : torch.nn.Module
        Any projection: offloaded, of an adapter, quantised to 8 or 4 bits.
    dtype : torch.dtype
        What a quantised one becomes; all others keep their own.
    """
    is_linear = hasattr(projection, "in_features") and hasattr(projection, "out_features")
    quantised = is_linear and floating_dtype(projection) is None
    copied = _as_linear(projection, dtype) if quantised else _merged(_held(projection))
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return copied


def floating_dtype(projection: nn.Module) -> torch.dtype | None:
    """The dtype of a projection's weight; None if it is quantised, whatever library did it."""
    weight = getattr(projection, "weight", None)
    # Quantised weights are integers, 8-bit floats, or tensors of a class of their library, which claim to be floats.
    if not isinstance(weight, Tensor) or type(weight).__module__.partition(".")[0] != "torch":
        return None
    return weight.dtype if weight.is_floating_point() and weight.dtype.itemsize > 1 else None


@torch.no_grad()
def _as_linear(projection: Any, dtype: torch.dtype) -> nn.Linear:
    """What a quantised projection computes, read off its answers to unit vectors."""
    device = next((tensor.device for tensor in _tensors(projection) if not tensor.is_meta), torch.device("cpu"))
    units = torch.eye(projection.in_features, dtype=dtype, device=device)
    bias = projection(torch.zeros_like(units[:1]))
    linear = nn.Linear(projection.in_features, projection.out_features, bool(bias.any()), device=device, dtype=dtype)
    linear.weight.copy_((projection(units) - bias).T)
    if linear.bias is not None:
        linear.bias.copy_(bias[0])
    return linear


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _merged(projection: Any) -> nn.Module:
    """A projection with what an adapter of PEFT adds to it, if it has one, in its weights."""
    if hasattr(projection, "get_base_layer"):
        projection.merge()
        projection = projection.get_base_layer()
    module: nn.Module = projection
    return module


def _held(projection: nn.Module) -> nn.Module:
    """A copy that keeps its weights, even where accelerate's hooks fetch the original's for each call."""
    hooks: dict[nn.Module, Any] = {
        module: module._hf_hook for module in projection.modules() if hasattr(module, "_hf_hook")
    }
    for module, hook in hooks.items():
        hook.pre_forward(module)
    kept: dict[int, Any] = {id(hook): None for hook in hooks.values()}
    # torch copies no tensor that is a part of another's memory, as those of most processes are.
    kept |= {id(of): nn.Parameter(of.detach().clone()) for of in projection.parameters() if hasattr(of, "to_local")}
    try:
        copied = copy.deepcopy(projection, kept)
    finally:
        for module, hook in hooks.items():
            hook.post_forward(module, None)
    for module in copied.modules():
        if hasattr(module, "_hf_hook"):
            for name in ("_hf_hook", "_old_forward", "forward"):
                vars(module).pop(name, None)
    return copied
