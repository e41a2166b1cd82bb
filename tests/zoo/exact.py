"""Models that compute in float64 to the end, and in no more time than that takes.

transformers normalises in float32, whatever the model's dtype. There two orders of adding may end a step apart; which
ones do, depends on the CPU. And torch has no fast convolution of volumes in float64: the patches of a tiny picture take
twenty times as long as the matrix product that they are.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def _written(norm: type[nn.Module]) -> tuple[Any, ...]:
    """What two norms have in common that are copies of each other."""
    methods = (getattr(norm, name, None) for name in ("forward", "_norm"))
    codes = (method.__code__ for method in methods if method is not None)
    return tuple((code.co_code, code.co_names, code.co_consts[1:]) for code in codes)


def _root_mean_square(states: Tensor, epsilon: float) -> Tensor:
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + epsilon)


_FORMULAS: dict[tuple[Any, ...], Callable[[Any, Tensor], Tensor]] = {
    _written(LlamaRMSNorm): lambda norm, states: norm.weight * _root_mean_square(states, norm.variance_epsilon),
    _written(Gemma3RMSNorm): lambda norm, states: (1 + norm.weight) * _root_mean_square(states, norm.eps),
}


@cache
def _norm_exactly(norm: type[nn.Module]) -> None:
    """Let all norms of a class keep to float64, where they are given it."""
    formula = _FORMULAS.get(_written(norm))
    if formula is None:
        return
    original: Any = norm.forward

    def forward(self: Any, states: Tensor) -> Tensor:
        return formula(self, states) if states.dtype == torch.float64 else original(self, states)

    norm.forward = forward  # type: ignore[method-assign]


@cache
def _embed_patches_as_a_product() -> None:
    """Let convolutions that see one place only, in float64, be the matrix products that they are."""
    original = nn.Conv3d.forward

    def forward(self: nn.Conv3d, volumes: Tensor) -> Tensor:
        is_one_place = volumes.shape[2:] == self.kernel_size and not any((*self.padding, self.groups - 1))
        if volumes.dtype != torch.float64 or not is_one_place:
            return original(self, volumes)
        return linear(volumes.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]

    nn.Conv3d.forward = forward  # type: ignore[method-assign]


def compute_exactly(model: nn.Module) -> None:
    """Let a model normalise in float64 while it is in float64."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            _norm_exactly(type(module))
        elif isinstance(module, nn.Conv3d):
            _embed_patches_as_a_product()
