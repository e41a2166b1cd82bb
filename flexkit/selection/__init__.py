"""Which high-res tokens are worth reading: maps of attention, policies, and the selector that joins them.

Pure tensors; nothing here knows a model.
"""

from flexkit.grids import resample_nearest
from flexkit.selection.margins import margin_cells, valid_cells
from flexkit.selection.policies import *  # noqa: F403 - one list of them, and no line for each here
from flexkit.selection.policies import __all__ as __all__
from flexkit.selection.policy import FunctionPolicy, Policy, as_policy, dilate
from flexkit.selection.ranking import within_budget
from flexkit.selection.schedule import Schedule
from flexkit.selection.selector import AttentionMapSelector
from flexkit.selection.serialize import policy_from_dict, policy_to_dict
from flexkit.selection.threshold import PUBLISHED_POLICY

__all__ += (
    "PUBLISHED_POLICY",
    "AttentionMapSelector",
    "FunctionPolicy",
    "Policy",
    "Schedule",
    "as_policy",
    "dilate",
    "margin_cells",
    "policy_from_dict",
    "policy_to_dict",
    "resample_nearest",
    "valid_cells",
    "within_budget",
)
