"""A strip over the layers that goes on from word to word."""

from collections.abc import Sequence
from io import BytesIO
from os import PathLike

from PIL import Image

from flexkit.tracing import Trace
from flexkit.viz.looks import Looks
from flexkit.viz.plot import figure_of

__all__ = ["animate_selection"]


def animate_selection(
    trace: Trace,
    image: Image.Image,
    path: str | PathLike[str],
    *,
    words: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    row: int = 0,
    image_index: int = 0,
    seconds: float = 0.8,
    dpi: int = 80,
) -> None:
    """Write an animated GIF with one frame for each word.

    Parameters
    ----------
    trace, image, words, steps, layers, row, image_index
        As for :func:`flexkit.plot_selection`.
    path : str or os.PathLike
        Of the file.
    seconds : float
        For which a frame is shown.
    dpi : int
        Pixels an inch.

    Raises
    ------
    ConfigError
        As for :func:`flexkit.plot_selection`.
    """
    looks = Looks.of(trace, words, steps=steps, layers=layers, row=row, image=image_index)
    frames = []
    for step, word in zip(looks.steps, looks.words, strict=True):
        file = BytesIO()
        figure_of(Looks((step,), looks.layers, (word,), looks.looks), image).savefig(file, dpi=dpi, format="png")
        frames.append(Image.open(file).convert("RGB").quantize(method=Image.Quantize.MEDIANCUT))
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 * seconds), loop=0)
