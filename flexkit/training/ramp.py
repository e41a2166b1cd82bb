"""The move from the base model to the patched one at the start of training."""

from typing import Any

from transformers import TrainerCallback

from flexkit.patching import set_alpha

__all__ = ["AlphaRamp"]


class AlphaRamp(TrainerCallback):
    """A callback of transformers' Trainer: alpha rises from 0 to 1 within a share of the steps (published code).

    Parameters
    ----------
    share : float
        Of all steps.
    """

    def __init__(self, share: float = 0.1) -> None:
        self.share = share

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called by the Trainer."""
        set_alpha(model, min(1.0, 1 / self.share * state.global_step / state.max_steps))
