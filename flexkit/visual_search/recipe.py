"""How the small model is trained: the stages, their order and their settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import flexkit
from flexkit.visual_search.model import ZOOM

__all__ = ["CONFIG", "STAGES", "Stage"]

CONFIG = flexkit.FlexConfig(start_layer=1, zoom=ZOOM, policy=flexkit.Threshold(8 / 255) & flexkit.TopK(6))
"""How the patched models select and read. The first layer's map finds an object by its colour, so the second reads."""
_UNIQUE_COLOURS = {"attribute": 1.0, "low-res": 1.0}


@dataclass(frozen=True)
class Stage:
    """How one stage is trained.

    Attributes
    ----------
    steps : int
        Of the optimiser.
    batch : int
        Scenes a step.
    learning_rate : float
        At its highest; it rises for the first tenth of the steps and falls to zero in their second half.
    tracks : dict of str to float
        How often a question is of each track.
    """

    steps: int
    batch: int
    learning_rate: float
    tracks: Mapping[str, float] = field(default_factory=lambda: dict(_UNIQUE_COLOURS))


STAGES = {
    "tower": Stage(3000, 2, 4e-3, {}),
    "base": Stage(2000, 8, 2e-3, {"attribute": 1.0, "low-res": 3.0}),
    "added": Stage(900, 8, 4e-3),
    "tuned": Stage(700, 8, 1e-3),
    "in_sequence": Stage(800, 8, 1.5e-3),
    "conjunction": Stage(900, 8, 1e-3, {"attribute": 1.0, "conjunction": 2.0, "low-res": 1.0}),
}
"""In their order; each is a folder of what :func:`flexkit.visual_search.training.train` writes.

``tower``: the vision tower alone, token by token. ``base``: everything but the tower, on low-res views. ``added``: the
added projections of the base, which stays as it is. ``tuned``: everything but the tower, from there on.
``in_sequence``: the same, not patched any more, with all high-res tokens in the sequence.
``conjunction``: as ``tuned``, with questions that name objects by colour and shape.
"""
