"""One sheet that shows both views of a picture and where each layer looked."""

import torch
from PIL import Image

from flexkit.demo.ask import Answer
from flexkit.demo.overlay import Box, draw_box, overlay, padded_square, view_of
from flexkit.demo.panels import Panel, panel_sheet

__all__ = ["draw_figure"]

_SIDE, _COLUMNS = 384, 3
_ROOM = 1 / 14
"""How far the part that is shown closely reaches to each side, as a share of the picture."""
_LEGEND = (
    "In colour with a yellow rim: the high-res tokens that the layer read. Grey: seen in low resolution only;",
    "the lighter, the more of the attention by which the layer before chose. All for the last position of the prompt.",
)


def draw_figure(
    picture: Image.Image, answer: Answer, *, heading: tuple[str, ...], box: tuple[int, int, int, int] | None = None
) -> Image.Image:
    """Draw the sheet.

    Parameters
    ----------
    picture : PIL.Image.Image
        RGB, the one that was asked about.
    answer : Answer
        What came of it.
    heading : tuple of str
        Lines above the panels.
    box : tuple of int, optional
        Left, top, right and bottom of the part to show closely, in pixels; by default where the layers looked most.

    Returns
    -------
    PIL.Image.Image
        RGB.
    """
    square = padded_square(picture, _SIDE)
    focus = _centred_on(box, picture.size) if box else _most_attended(answer)
    size = f"{picture.width} x {picture.height} pixels, padded to a square"
    panels = [
        Panel(draw_box(square, focus), "The picture", size),
        _close(answer, "pixel_values", focus, "In the low-res view"),
        _close(answer, "hd_pixel_values", focus, "In the high-res view"),
    ]
    for layer, source in answer.layers.items():
        mask, scores = answer.trace.mask(0, source)[0], answer.trace.scores(0, source)[0]
        note = f"read {int(mask.sum())} of {mask.numel()} high-res tokens"
        panels.append(Panel(overlay(square, mask, scores), f"Layer {layer}", note))
    return panel_sheet(panels, _COLUMNS, heading, _LEGEND)


def _close(answer: Answer, name: str, focus: Box, title: str) -> Panel:
    image_processor = answer.asked.way.processor.image_processor
    view = view_of(answer.asked.inputs[name][0], image_processor.image_mean, image_processor.image_std)
    left, top = (round(share * view.width) for share in focus[:2])
    side = round(2 * _ROOM * view.width)
    close = view.crop((left, top, left + side, top + side)).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    return Panel(close, title, f"the frame: {side} x {side} of {view.width} x {view.height} pixels")


def _centred_on(box: tuple[int, int, int, int], size: tuple[int, int]) -> Box:
    longest = max(size)
    x, y = ((box[axis] + box[axis + 2] + longest - size[axis]) / 2 / longest for axis in (0, 1))
    return _around(x, y)


def _most_attended(answer: Answer) -> Box:
    total = torch.stack([answer.trace.scores(0, source)[0] for source in answer.layers.values()]).sum(0)
    rows, columns = total.shape
    row, column = divmod(int(total.argmax()), columns)
    return _around((column + 0.5) / columns, (row + 0.5) / rows)


def _around(x: float, y: float) -> Box:
    x, y = (min(max(centre, _ROOM), 1 - _ROOM) for centre in (x, y))
    return x - _ROOM, y - _ROOM, x + _ROOM, y + _ROOM
