"""A strip over the layers that goes on from word to word, or a video that goes on from frame to frame."""

import itertools
from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from os import PathLike
from pathlib import Path

from PIL import Image

from flexkit.encoding.clips import pyav
from flexkit.errors import ConfigError
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
    """Write an animated GIF or MP4, with a frame for each word; of a video, with one for each word and low-res frame.

    Parameters
    ----------
    trace, image, words, steps, layers, row, image_index
        As for :func:`flexkit.plot_selection`.
    path : str or os.PathLike
        Of the file, which ends in ``.gif`` or ``.mp4``. Writing MP4 needs PyAV (``pip install 'flexkit-vlm[video]'``).
    seconds : float
        For which a frame is shown.
    dpi : int
        Pixels an inch.

    Raises
    ------
    ConfigError
        As for :func:`flexkit.plot_selection`; and if the file ends otherwise, or PyAV is missing.
    """
    write = _WRITERS.get(Path(path).suffix.lower())
    if write is None:
        raise ConfigError(f"{path} ends in {Path(path).suffix!r}; animations are written as {' or '.join(_WRITERS)}.")
    chosen = Looks.of(trace, words, steps=steps, layers=layers, row=row, image=image_index)
    looks, pictures = columns_of(chosen, image)
    strips = [looks.layers] if chosen.frames is None else [(frame,) for frame in looks.layers]
    frames = []
    for (step, word), strip in itertools.product(zip(looks.steps, looks.words, strict=True), strips):
        file = BytesIO()
        figure = figure_of(Looks((step,), strip, (word,), looks.looks, looks.title), pictures)
        figure.savefig(file, dpi=dpi, format="png")
        frames.append(Image.open(file).convert("RGB"))
    write(path, frames, seconds)


def _write_gif(path: str | PathLike[str], frames: Sequence[Image.Image], seconds: float) -> None:
    first, *others = (frame.quantize(method=Image.Quantize.MEDIANCUT) for frame in frames)
    first.save(path, format="GIF", save_all=True, append_images=others, duration=round(1000 * seconds), loop=0)


def _write_mp4(path: str | PathLike[str], frames: Sequence[Image.Image], seconds: float) -> None:
    av = pyav()
    width, height = (side + side % 2 for side in frames[0].size)  # colours are kept for squares of two by two pixels
    with av.open(str(path), "w", format="mp4") as file:
        rate = (1 / Fraction(seconds)).limit_denominator(1000)
        stream = file.add_stream("h264", rate=rate, width=width, height=height, options={"crf": "18"})
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            canvas = Image.new("RGB", (width, height), "white")
            canvas.paste(frame)
            file.mux(stream.encode(av.VideoFrame.from_image(canvas)))
        file.mux(stream.encode())


_WRITERS = {".gif": _write_gif, ".mp4": _write_mp4}
