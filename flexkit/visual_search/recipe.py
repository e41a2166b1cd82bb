"""How the small model is trained: the stages, their order and their settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import flexkit
from flexkit.visual_search.model import ZOOM

__all__ = ["CONFIG", "PRETRAINED_STAGES", "READS_CHOICES", "STAGES", "Stage"]

CONFIG = flexkit.FlexConfig(start_layer=1, zoom=ZOOM, policy=flexkit.TopK(6))
"""How the patched models select and read. The first layer's map finds an object by its colour, so the second reads."""
READS_CHOICES = flexkit.FlexConfig.training_free(
    zoom=ZOOM, high_res_states="features", gate=None, surer=None, queries="all", share_selection=False
)
"""How ``letters_in_sequence`` reads a high-res view in place of its sequence: behind a question stand options, so that
the words that name an object are not the last, and every word reads."""
_GROUNDED = 2
"""The layer that is told where the objects are that it takes colour and shape to name."""
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
    grounded : int, optional
        A layer whose attention is told where the objects are that it takes colour and shape to name.
    budgets : tuple of int
        For each step, one is drawn of these: how many cells a layer reads. With none, the policy stays what it is.
    save_steps : int
        After how many steps a stage is saved, to be gone on with.
    letters : float
        How often a question has options, the right one of which is to be said, and its letter.
    lists : int
        How many lists of options a step has that shows no scene; with none, all steps show scenes.
    """

    steps: int
    batch: int
    learning_rate: float
    tracks: Mapping[str, float] = field(default_factory=lambda: dict(_UNIQUE_COLOURS))
    grounded: int | None = None
    budgets: tuple[int, ...] = ()
    save_steps: int = 200
    letters: float = 0.0
    lists: int = 0


STAGES = {
    "tower": Stage(3000, 2, 4e-3, {}),
    "base": Stage(1200, 8, 2e-3, {"attribute": 1.0, "low-res": 3.0, "close-up": 2.0}),
    "added": Stage(400, 8, 4e-3),
    "tuned": Stage(800, 8, 2e-3, budgets=(3, 6, 6, 6, 12, 24, 64)),
    "in_sequence": Stage(800, 4, 2e-3),
    "grounded": Stage(900, 8, 2e-3, {"conjunction": 4.0, "low-res": 1.0, "close-up": 0.5}, grounded=_GROUNDED),
    "conjunction": Stage(900, 8, 2e-3, {"conjunction": 4.0, "low-res": 1.0}, grounded=_GROUNDED),
    "lookup": Stage(1600, 8, 4e-3, {"low-res": 1.0, "close-up": 1.0}, lists=64),
    "choosing": Stage(700, 8, 2e-3, {"low-res": 1.0, "close-up": 2.0}, letters=0.5),
    "letters_in_sequence": Stage(300, 4, 2e-3, letters=0.5),
}
"""In their order; each is a folder of what :func:`flexkit.visual_search.training.train` writes.

``tower``: the vision tower alone, token by token. ``base``: everything but the tower, on low-res views and close-ups.
``added``: the added projections of the base, which stays as it is. ``tuned``: everything but the tower, from there on.
``in_sequence``: everything but the tower of the base, with all high-res tokens in the sequence.
``grounded``: the same of the base, but one layer is told where the objects are that it takes colour and shape to name.
``conjunction``: everything but the tower, from there on, patched; the layer behind the one that is told reads.
``lookup``: everything but the tower of the base, with one more layer and tokens for letters: in most steps, on lists of
options without a picture.
``choosing``: everything but the tower, from there on; as ``base``, with words and options behind
the questions.
``letters_in_sequence``: the same, from there on, with all high-res tokens in the sequence.
"""

PRETRAINED_STAGES = {
    "projector": Stage(1500, 2, 3e-3, {}),
    "base": Stage(360, 4, 1e-3, {"low-res": 3.0, "close-up": 2.0}, save_steps=25),
}
"""Those of :func:`flexkit.visual_search.pretrained.training.train_base`.

``projector``: the projector alone, token by token, towards the words of the language model. ``base``: the projector,
and LoRA on the attention of all layers, on low-res views and close-ups.
"""
