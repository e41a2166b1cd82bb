"""What a trace shows of one image, for those who draw it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from flexkit.errors import ConfigError
from flexkit.tracing import Trace

__all__ = ["Look", "Looks"]


@dataclass(frozen=True)
class Look:
    """What the map of one layer selected at one step.

    Attributes
    ----------
    mask : numpy.ndarray
        ``(rows, columns)`` of the high-res grid, bool; of a video with frames in front.
    scores : numpy.ndarray
        ``(rows, columns)`` of the low-res grid, float: the attention that was selected by, 1 where it was largest; of a
        video with frames in front.
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

    def frames(self) -> "list[Look]":
        """What was selected of each low-res frame of a video, in it and in the frames that take its place."""
        count = len(self.scores)
        masks: np.ndarray = np.logical_or.reduce(self.mask.reshape(count, -1, *self.mask.shape[1:]), axis=1)
        return [Look(mask, scores, self.shut) for mask, scores in zip(masks, self.scores, strict=True)]


@dataclass(frozen=True)
class Looks:
    """Steps and layers of a trace, for one image of one batch row; or steps and frames, for one layer and a video.

    Attributes
    ----------
    steps : tuple of int
        Indices of the steps.
    layers : tuple of int
        Indices of the layers, or of frames.
    words : tuple of str
        For each step the word that was chosen by what it looked at.
    looks : dict
        From step and layer to what was selected.
    """

    steps: tuple[int, ...]
    layers: tuple[int, ...]
    words: tuple[str, ...]
    looks: dict[tuple[int, int], Look]
    title: str = "map of layer"
    """What ``layers`` count."""

    @property
    def frames(self) -> int | None:
        """Number of low-res frames of a video; None of a picture."""
        return next((len(look.scores) for look in self.looks.values() if look.scores.ndim == 3), None)

    def by_frame(self) -> "Looks":
        """Those of the last layer at a video, with its frames in the place of layers."""
        last = {step: layer for step, layer in sorted(self.looks)}
        looks = {
            (step, frame): look
            for step, layer in last.items()
            for frame, look in enumerate(self.looks[step, layer].frames())
        }
        return Looks(
            self.steps, tuple(range(self.frames or 1)), self.words, looks, f"layer {max(last.values())}, frame"
        )

    def pictures(self, image: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
        """The picture, or that of each low-res frame.

        Raises
        ------
        ConfigError
            If there are fewer or more.
        """
        pictures = [image] if isinstance(image, Image.Image) else list(image)
        if len(pictures) != (self.frames or 1):
            what = "one picture" if self.frames is None else f"a video of {self.frames} low-res frames"
            raise ConfigError(f"{len(pictures)} pictures were given for {what}; give one for each.")
        return pictures

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
