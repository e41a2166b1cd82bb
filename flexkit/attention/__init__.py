"""Hierarchical self-attention: base keys and selected high-res keys in one softmax; rotary positions of both.

Plain tensors; nothing here knows transformers.
"""

from flexkit.attention.base import base_attention, key_mask
from flexkit.attention.core import attend, attention_logits, attention_map, log_normaliser, merge_high_res
from flexkit.attention.hierarchical import HierarchicalSelfAttention
from flexkit.attention.joint import joint_attention, replaced_keys
from flexkit.attention.output import HierarchicalAttentionOutput
from flexkit.attention.rotary import rotary_tables, rotate
from flexkit.attention.rows import QueryRows
from flexkit.grids import fractional_positions, interpolate_table

__all__ = [
    "HierarchicalAttentionOutput",
    "HierarchicalSelfAttention",
    "QueryRows",
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
