"""Pictures side by side, each with a caption: what a demo needs of a plotting library."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

__all__ = ["Panel", "panel_sheet"]

_GAP, _CAPTION, _TEXT = 28, 62, 17
_INK, _PAPER = "#1a1a1a", "white"


@dataclass(frozen=True)
class Panel:
    """A picture and the two lines under it.

    Attributes
    ----------
    image : PIL.Image.Image
        All panels of a sheet have one size.
    title, note : str
        First and second line.
    """

    image: Image.Image
    title: str
    note: str = ""


def panel_sheet(panels: Sequence[Panel], columns: int, heading: Sequence[str], legend: Sequence[str]) -> Image.Image:
    """Lay out panels in rows, under a heading and above a legend.

    Parameters
    ----------
    panels : sequence of Panel
        At least one.
    columns : int
        Panels in a row.
    heading, legend : sequence of str
        Lines of text; what is too long for the sheet is shortened.

    Returns
    -------
    PIL.Image.Image
        RGB.
    """
    width, height = panels[0].image.size
    rows = -(-len(panels) // columns)
    line = round(1.5 * _TEXT)
    top = _GAP + line * len(heading) + _GAP // 2
    size = (
        _GAP + columns * (width + _GAP),
        top + rows * (height + _CAPTION) + line * len(legend) + _GAP,
    )
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    room = size[0] - 2 * _GAP
    for index, text in enumerate(heading):
        _write(draw, (_GAP, _GAP + line * index), text, room, bold=index == 0)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        x, y = _GAP + column * (width + _GAP), top + row * (height + _CAPTION)
        sheet.paste(panel.image, (x, y))
        _write(draw, (x, y + height + 6), panel.title, width, bold=True)
        _write(draw, (x, y + height + 6 + round(1.3 * _TEXT)), panel.note, width)
    for index, text in enumerate(legend):
        _write(draw, (_GAP, size[1] - _GAP - line * (len(legend) - index)), text, room)
    return sheet


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, room: int, bold: bool = False) -> None:
    font = ImageFont.load_default(_TEXT)
    stroke = 0.4 if bold else 0
    text = " ".join(text.split())
    if draw.textlength(text, font) > room:
        while text and draw.textlength(text + " ...", font) > room:
            text = text[:-1]
        text += " ..."
    draw.text(place, text, fill=_INK, font=font, stroke_width=stroke, stroke_fill=_INK)
