"""Hierarchical self-attention: base keys and selected high-res keys in one softmax; rotary positions of both.

Plain tensors; nothing here knows transformers.
"""

import warnings
from typing import Any

from flexkit.attention.core import (
    attend,
    attention_logits,
    attention_map,
    joint_attention,
    log_normaliser,
    merge_high_res,
)
from flexkit.attention.hierarchical import HierarchicalAttentionOutput, HierarchicalSelfAttention
from flexkit.attention.plain import base_attention
from flexkit.attention.ragged import RaggedIndex
from flexkit.attention.rotary import rotary_tables, rotate
from flexkit.attention.select import replaced_keys
from flexkit.attention.visible import key_mask
from flexkit.grids import fractional_positions, interpolate_table

__all__ = [
    "HierarchicalAttentionOutput",
    "HierarchicalSelfAttention",
    "RaggedIndex",
    "attend",
    "attention_logits",
    "attention_map",
    "base_attention",
    "fractional_positions",
    "interpolate_table",
    "joint_attention",
    "key_mask",
    "log_normaliser",
    "merge_high_res",
    "replaced_keys",
    "rotary_tables",
    "rotate",
]


def __getattr__(name: str) -> Any:
    if name == "QueryRows":
        warnings.warn("QueryRows is RaggedIndex now, which serves tokens too.", DeprecationWarning, stacklevel=2)
        return RaggedIndex
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
