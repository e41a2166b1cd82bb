"""Which high-res tokens are worth reading: maps of attention, policies, and the selector that joins them.

Pure tensors; nothing here knows a model.
"""

from flexkit.selection.border import Border
from flexkit.selection.budget import within_budget
from flexkit.selection.center import Center
from flexkit.selection.compose import Complement, Intersection, Union
from flexkit.selection.constant import Everything, Nothing
from flexkit.selection.margins import margin_cells, valid_cells
from flexkit.selection.morphology import Dilated, Pooled, dilate
from flexkit.selection.policy import FunctionPolicy, Policy, as_policy
from flexkit.selection.random import Random
from flexkit.selection.resample import resample_nearest
from flexkit.selection.schedule import Schedule
from flexkit.selection.selector import PUBLISHED_POLICY, AttentionMapSelector
from flexkit.selection.serialize import policy_from_dict, policy_to_dict
from flexkit.selection.threshold import Threshold
from flexkit.selection.topk import TopK
from flexkit.selection.topp import TopP

__all__ = [
    "PUBLISHED_POLICY",
    "AttentionMapSelector",
    "Border",
    "Center",
    "Complement",
    "Dilated",
    "Everything",
    "FunctionPolicy",
    "Intersection",
    "Nothing",
    "Policy",
    "Pooled",
    "Random",
    "Schedule",
    "Threshold",
    "TopK",
    "TopP",
    "Union",
    "as_policy",
    "dilate",
    "margin_cells",
    "policy_from_dict",
    "policy_to_dict",
    "resample_nearest",
    "valid_cells",
    "within_budget",
]
