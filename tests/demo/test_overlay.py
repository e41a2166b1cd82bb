import numpy as np
import pytest
import torch
from PIL import Image

from flexkit.demo.overlay import draw_box, overlay, padded_square, view_of
from flexkit.demo.panels import Panel, panel_sheet

RED, RIM = [200, 0, 0], [255, 176, 0]


@pytest.fixture
def square() -> Image.Image:
    return Image.new("RGB", (120, 120), tuple(RED))


def test_selected_is_in_colour_and_the_rest_grey(square: Image.Image) -> None:
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[2:4, 0:2] = True
    pixels = np.asarray(overlay(square, mask, torch.ones(2, 2)))
    assert pixels.shape == (120, 120, 3)
    assert pixels[60, 20].tolist() == RED
    assert pixels[41, 20].tolist() == pixels[78, 20].tolist() == pixels[60, 38].tolist() == RIM
    assert pixels[60, 1].tolist() == RIM, "the edge of the picture closes the rim"
    outside = np.ones((120, 120), dtype=bool)
    outside[40:80, :40] = False
    assert (pixels[outside] == pixels[outside][:, :1]).all()
    inside = pixels[43:77, 3:37]
    assert (inside == RED).all(), "neighbouring tokens share one rim"


def test_more_attention_is_lighter(square: Image.Image) -> None:
    scores = torch.tensor([[0.0, 0.1], [0.2, 0.4]])
    pixels = np.asarray(overlay(square, torch.zeros(6, 6, dtype=torch.bool), scores))[..., 0].astype(int)
    assert 0 < pixels[10, 10] < pixels[10, 110] < pixels[110, 10] < pixels[110, 110]


def test_no_attention_at_all_is_dark(square: Image.Image) -> None:
    nothing = overlay(square, torch.zeros(4, 4, dtype=torch.bool), torch.zeros(2, 2)).getcolors()
    assert nothing is not None and len(nothing) == 1 and 0 < max(nothing[0][1]) < 128


def test_low_precision_maps_are_drawn(square: Image.Image) -> None:
    mask = torch.ones(4, 4, dtype=torch.bool)
    exact = overlay(square, mask, torch.ones(2, 2))
    assert overlay(square, mask, torch.ones(2, 2, dtype=torch.bfloat16)) == exact


@pytest.mark.parametrize(("size", "inside", "margin"), [((80, 40), (50, 30), (50, 5)), ((2, 40), (50, 50), (5, 50))])
def test_padded_square_keeps_the_proportions(
    size: tuple[int, int], inside: tuple[int, int], margin: tuple[int, int]
) -> None:
    padded = padded_square(Image.new("RGB", size, "white"), 100)
    assert padded.size == (100, 100)
    assert padded.getpixel(inside) == (255, 255, 255) != padded.getpixel(margin)


def test_view_of_inverts_the_normalisation() -> None:
    picture = torch.randint(0, 256, (3, 5, 4))
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    normalised = (picture / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert np.array_equal(np.asarray(view_of(normalised, mean, std)), picture.permute(1, 2, 0).numpy())


def test_box_is_framed_and_the_picture_left_alone(square: Image.Image) -> None:
    framed = draw_box(square, (0.25, 0.25, 0.75, 0.75))
    assert framed.getpixel((33, 60)) == (255, 255, 255) and framed.getpixel((30, 60)) == (0, 0, 0)
    assert framed.getpixel((60, 60)) == framed.getpixel((10, 60)) == tuple(RED)
    assert square.getcolors() == [(120 * 120, tuple(RED))]


def test_sheet_lays_panels_out_in_rows() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 0)]
    panels = [Panel(Image.new("RGB", (60, 50), colour), "title") for colour in colours]
    sheet = panel_sheet(panels, 3, ["heading"], ["legend"])
    pixels = np.asarray(sheet)
    places = [np.argwhere((pixels == colour).all(-1)) for colour in colours]
    assert [len(place) for place in places] == [60 * 50] * 4
    tops, lefts = zip(*(place.min(0).tolist() for place in places), strict=True)
    assert tops[0] == tops[1] == tops[2] < tops[3] and lefts[0] == lefts[3] < lefts[1] < lefts[2]


def test_long_lines_are_shortened() -> None:
    panel = Panel(Image.new("RGB", (200, 20), "white"), "x" * 500, "two\nlines")
    sheet = np.asarray(panel_sheet([panel], 1, ["word " * 200], [])).min(-1)
    margin = 20
    assert (sheet[:, :margin] == 255).all() and (sheet[:, -margin:] == 255).all()
    assert (sheet < 128).any()
