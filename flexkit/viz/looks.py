"""What a trace shows of one image, for those who draw it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flexkit.errors import ConfigError
from flexkit.tracing import Trace

__all__ = ["Look", "Looks"]


@dataclass(frozen=True)
class Look:
    """What the map of one layer selected at one step.

    Attributes
    ----------
    mask : numpy.ndarray
        ``(rows, columns)`` of the high-res grid, bool.
    scores : numpy.ndarray
        ``(rows, columns)`` of the low-res grid, float: the attention that was selected by, 1 where it was largest.
    shut : bool
        Whether nothing was read because the gate stayed shut.
    """

    mask: np.ndarray
    scores: np.ndarray
    shut: bool

    @property
    def fraction(self) -> float:
        """Share of the high-res tokens that was selected."""
        return float(self.mask.mean())


@dataclass(frozen=True)
class Looks:
    """Steps and layers of a trace, for one image of one batch row.

    Attributes
    ----------
    steps : tuple of int
        Indices of the steps.
    layers : tuple of int
        Indices of the layers.
    words : tuple of str
        For each step the word that was chosen by what it looked at.
    looks : dict
        From step and layer to what was selected.
    """

    steps: tuple[int, ...]
    layers: tuple[int, ...]
    words: tuple[str, ...]
    looks: dict[tuple[int, int], Look]

    @classmethod
    def of(
        cls,
        trace: Trace,
        words: Sequence[str] | None = None,
        *,
        steps: Sequence[int] | None = None,
        layers: Sequence[int] | None = None,
        row: int = 0,
        image: int = 0,
    ) -> "Looks":
        """Those that are wanted, all by default; steps and layers are checked against the trace.

        Raises
        ------
        ConfigError
            If nothing was recorded, or a step, layer, row or image was not, or there are too few words.
        """
        if not trace.steps:
            raise ConfigError("the trace is empty: call the model with high-res inputs inside flexkit.trace(model).")
        chosen = tuple(range(len(trace)) if steps is None else (step % len(trace) for step in steps))
        own = tuple(trace.layers if layers is None else layers)
        if words is not None and len(words) <= max(chosen):
            raise ConfigError(f"{len(words)} words were given for {len(trace)} steps; give one for each step.")
        names = tuple(f"step {step}" if words is None else words[step].strip() or "␣" for step in chosen)
        looks = {
            (step, layer): _look(trace, step, layer, row, image)
            for step in chosen
            for layer in own
            if layer in trace.steps[step].layers or layers is not None
        }
        return cls(chosen, own, names, looks)


def _look(trace: Trace, step: int, layer: int, row: int, image: int) -> Look:
    mask = trace.mask(step, layer, image=image)
    if not 0 <= row < len(mask):
        raise ConfigError(f"there is no batch row {row}; the trace has {len(mask)}.")
    scores = trace.scores(step, layer, image=image)[row].float().numpy()
    shut = bool(trace.steps[step].shut[row])
    return Look(mask[row].numpy(), scores / max(float(scores.max()), 1e-12), shut)
