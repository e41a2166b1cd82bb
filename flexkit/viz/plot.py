"""Overlays of what was selected, for each layer and each word."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from flexkit.errors import ConfigError
from flexkit.tracing import Trace
from flexkit.viz.looks import Look, Looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "RIM", "columns_of", "figure_of", "plot_selection"]

COLOURS = "cividis"
"""Tells more from less attention to people with any colour vision."""
RIM = "#D55E00"
_PANEL = 2.3
"""Side of a panel in inches."""


def plot_selection(
    trace: Trace,
    image: Image.Image | Sequence[Image.Image],
    *,
    words: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    row: int = 0,
    image_index: int = 0,
) -> "Figure":
    """Show what each layer's map selected, one row of panels for each word and one column for each layer.

    Of a video one layer is shown, with a column for each of its low-res frames.

    Selected high-res tokens are in the picture's own colours, with a rim; elsewhere the picture is grey, and coloured
    by the attention that was selected by. With the published schedule the *next* layer reads what a map selects. Where
    the gate stayed shut, because the low-res answer was certain, nothing was read, and no map was recorded.

    Parameters
    ----------
    trace : Trace
        From :func:`flexkit.trace`.
    image : PIL.Image.Image or sequence of PIL.Image.Image
        What the model's views show: :meth:`flexkit.FlexProcessor.shown` of the picture; or a picture for each low-res
        frame of a video.
    words : sequence of str, optional
        For each step the token that was chosen, to stand beside what it looked at.
    steps, layers : sequence of int, optional
        Those to show, in this order; all by default. One step gives a strip over the layers. Of a video the last layer
        is shown.
    row : int
        Batch row.
    image_index : int
        Which of its images and videos.

    Returns
    -------
    matplotlib.figure.Figure
        To show or save.

    Raises
    ------
    ConfigError
        If the trace lacks what is to be shown, or matplotlib is not installed.

    Examples
    --------
    .. code-block:: python

        with flexkit.trace(model) as trace:
            output = model.generate(**inputs, max_new_tokens=8)
        words = [processor.decode(token) for token in output[0, inputs["input_ids"].shape[1] :]]
        flexkit.plot_selection(trace, processor.shown(image), words=words).savefig("selection.png")
    """
    looks = Looks.of(trace, words, steps=steps, layers=layers, row=row, image=image_index)
    return figure_of(*columns_of(looks, image))


def columns_of(looks: Looks, image: Image.Image | Sequence[Image.Image]) -> tuple[Looks, Mapping[int, Image.Image]]:
    """What a figure has columns of, layers or the frames of a video, and the picture for each."""
    pictures = looks.pictures(image)
    if looks.frames is None:
        return looks, dict.fromkeys(looks.layers, pictures[0])
    return looks.by_frame(), dict(enumerate(pictures))


def figure_of(looks: Looks, pictures: Mapping[int, Image.Image]) -> "Figure":
    """The figure of what was picked out of a trace, with the picture for each column."""
    figures: Any = _matplotlib("figure")
    cells: Any = _matplotlib("cm").ScalarMappable(_matplotlib("colors").Normalize(0, 1), COLOURS)
    pixels = {column: np.asarray(picture.convert("RGB")) for column, picture in pictures.items()}
    rows, columns = len(looks.steps), len(looks.layers)
    figure: Figure = figures.Figure(figsize=(_PANEL * columns + 1.6, _PANEL * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for index, (step, word) in enumerate(zip(looks.steps, looks.words, strict=True)):
        for place, layer in enumerate(looks.layers):
            own = axes[index, place]
            own.set(xticks=[], yticks=[])
            look = looks.looks.get((step, layer))
            if look is None:
                own.axis("off")
                continue
            _draw(own, look, pixels[layer])
            selected = "nothing read: gate shut" if look.shut else f"{100 * look.fraction:.1f} % selected"
            own.set_xlabel(selected, fontsize=8)
        axes[index, 0].axis("on")
        axes[index, 0].set_ylabel(word, fontsize=11, fontweight="bold", rotation=0, ha="right", va="center")
    for place, layer in enumerate(looks.layers):
        axes[0, place].set_title(f"{looks.title} {layer}", fontsize=10)
    bar = figure.colorbar(cells, ax=axes, shrink=0.8, aspect=30, ticks=[0, 1])
    bar.ax.set_yticklabels(["none", "most"])
    bar.set_label("attention, where not selected")
    handle = _matplotlib("lines").Line2D([], [], color=RIM, linewidth=2, label="selected high-res tokens")
    figure.legend(handles=[handle], loc="outside lower left", frameon=False)
    return figure


def _draw(axes: "Axes", look: Look, pixels: np.ndarray) -> None:
    height, width = pixels.shape[:2]
    grey = pixels.mean(-1, keepdims=True).repeat(3, axis=2).astype(np.uint8)
    extent = (0, width, height, 0)
    axes.imshow(grey, extent=extent)
    axes.imshow(look.scores, extent=extent, cmap=COLOURS, vmin=0, vmax=1, alpha=0.55, interpolation="nearest")
    mask = _stretched(look.mask, (height, width))
    axes.imshow(np.dstack([pixels, 255 * mask]).astype(np.uint8), extent=extent)
    if mask.any() and not mask.all():
        framed = np.pad(mask, 1).astype(float)
        across, down = np.arange(-0.5, width + 1), np.arange(-0.5, height + 1)
        axes.contour(across, down, framed, levels=[0.5], colors=[RIM], linewidths=1.2)
    axes.set(xlim=(0, width), ylim=(height, 0))


def _stretched(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


def _matplotlib(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'flexkit-vlm[viz]'.") from error
