"""A strip over the layers that goes on from word to word, or a video that goes on from frame to frame."""

import itertools
from collections.abc import Sequence
from io import BytesIO
from os import PathLike

from PIL import Image

from flexkit.tracing import Trace
from flexkit.viz.looks import Looks
from flexkit.viz.plot import columns_of, figure_of

__all__ = ["animate_selection"]


def animate_selection(
    trace: Trace,
    image: Image.Image | Sequence[Image.Image],
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
    """Write an animated GIF with one frame for each word; of a video, with one for each word and low-res frame.

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
    chosen = Looks.of(trace, words, steps=steps, layers=layers, row=row, image=image_index)
    looks, pictures = columns_of(chosen, image)
    strips = [looks.layers] if chosen.frames is None else [(frame,) for frame in looks.layers]
    frames = []
    for (step, word), strip in itertools.product(zip(looks.steps, looks.words, strict=True), strips):
        file = BytesIO()
        figure = figure_of(Looks((step,), strip, (word,), looks.looks, looks.title), pictures)
        figure.savefig(file, dpi=dpi, format="png")
        frames.append(Image.open(file).convert("RGB").quantize(method=Image.Quantize.MEDIANCUT))
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 * seconds), loop=0)
