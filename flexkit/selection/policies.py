"""The policies that flexkit brings along: what the packages export, and what can be rebuilt from a description."""

from flexkit.selection.border import Border
from flexkit.selection.center import Center
from flexkit.selection.frames import Frames
from flexkit.selection.policy import Complement, Dilated, Everything, Intersection, Nothing, OverFrames, Pooled, Union
from flexkit.selection.random import Random
from flexkit.selection.threshold import Threshold
from flexkit.selection.topk import TopK
from flexkit.selection.topp import TopP

__all__: tuple[str, ...] = (
    "Border",
    "Center",
    "Complement",
    "Dilated",
    "Everything",
    "Frames",
    "Intersection",
    "Nothing",
    "OverFrames",
    "Pooled",
    "Random",
    "Threshold",
    "TopK",
    "TopP",
    "Union",
)
