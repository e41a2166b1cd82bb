"""Looking into the attention of any model, patched or not."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from flexkit.patching.seam.attention import modeling_module


@dataclass
class Record:
    """What the kernels of some attention modules were given in the last call."""

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    masks: dict[int, Tensor | None] = field(default_factory=dict)
    position_ids: Tensor | None = None


_watched: dict[int, tuple[int, Record]] = {}


def _seeing(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    if id(module) in _watched:
        layer, record = _watched[id(module)]
        record.keys[layer], record.values[layer], record.masks[layer] = key, value, attention_mask
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register("seeing", _seeing)
AttentionMaskInterface.register("seeing", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def watching(model: Any, decoder: nn.Module, layers: Any) -> Iterator[Record]:
    """Record what happens in the layers of a model, which runs with torch's kernel meanwhile."""
    record = Record()
    parts = {"": model.config} | {name: getattr(model.config, name, None) for name in model.config.sub_configs}
    kernels = {name: getattr(part, "_attn_implementation", None) for name, part in parts.items()}
    before = {name: kernel for name, kernel in kernels.items() if kernel}  # a part without a model has none
    model.set_attn_implementation("seeing")

    def keep_positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        record.position_ids = kwargs.get("position_ids")

    hook = decoder.register_forward_pre_hook(keep_positions, with_kwargs=True)
    for layer in layers:
        _watched[id(layer.attention)] = layer.index, record
    try:
        yield record
    finally:
        hook.remove()
        for layer in layers:
            del _watched[id(layer.attention)]
        model.set_attn_implementation(before)


@contextmanager
def kernel_changed(
    attentions: Collection[Any], change: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Run some attention modules of one model with a changed kernel, made of their own."""
    first = next(iter(attentions))
    name, modeling = first.config._attn_implementation, modeling_module(first)
    kernel = AttentionInterface().get_interface(name, getattr(modeling, "eager_attention_forward", None))
    changed = change(kernel)

    def chosen(module: Any, *tensors: Any, **options: Any) -> Any:
        return (changed if module in attentions else kernel)(module, *tensors, **options)

    holder: Any = vars(modeling) if name == "eager" else AttentionInterface._global_mapping
    entry = "eager_attention_forward" if name == "eager" else name
    own, holder[entry] = holder[entry], chosen
    try:
        yield
    finally:
        holder[entry] = own


@contextmanager
def attention_input(layers: Any, change: Callable[[Any, Tensor], Tensor]) -> Iterator[None]:
    """Change the hidden states that enter the attention of each layer."""

    def hook_of(layer: Any) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if args:
                return (change(layer, args[0]), *args[1:]), kwargs
            states = [name for name in kwargs if name.endswith("hidden_states")]
            names = [name for name in states if isinstance(kwargs[name], Tensor)]  # others ask for an output
            return args, kwargs | {name: change(layer, kwargs[name]) for name in names}

        return hook

    hooks = [layer.attention.register_forward_pre_hook(hook_of(layer), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def norm_input(layers: Any, change: Callable[[Any, Tensor], Tensor]) -> Iterator[None]:
    """Change the hidden states that enter the norm in front of the attention of each layer."""

    def hook_of(layer: Any) -> Any:
        return lambda module, args: (change(layer, args[0]), *args[1:])

    hooks = [
        norm.register_forward_pre_hook(hook_of(layer))
        for layer in layers
        for norm in (layer.input_norm, layer.value_norm)
        if norm is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
