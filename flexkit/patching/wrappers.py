"""What may stand around a patched model or its projections: DistributedDataParallel, torch.compile, PEFT."""

from typing import Any

from torch import nn

__all__ = ["inner", "inside"]


def inside(model: nn.Module, attribute: str) -> nn.Module | None:
    """The outermost module of ``model``, itself first, that has an attribute of its own; None if there is none."""
    return next((module for module in model.modules() if attribute in vars(module)), None)


def inner(projection: nn.Module) -> nn.Module:
    """The projection that PEFT has wrapped: the copy that it trains, or the layer beneath an adapter."""
    wrapper: Any = projection
    if hasattr(wrapper, "modules_to_save"):
        active = wrapper.active_adapters
        return wrapper.modules_to_save[active[0]] if active else wrapper.original_module  # type: ignore[no-any-return]
    return wrapper.get_base_layer() if hasattr(wrapper, "get_base_layer") else projection
