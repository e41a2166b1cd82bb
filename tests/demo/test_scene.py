import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from flexkit.demo import draw_scene

COLOURS = {
    "orange": (230, 159, 0),
    "sky blue": (86, 180, 233),
    "green": (0, 158, 115),
    "yellow": (240, 228, 66),
    "blue": (0, 114, 178),
    "red": (213, 94, 0),
    "pink": (204, 121, 167),
}


def _equal(first: Image.Image, second: Image.Image) -> bool:
    return ImageChops.difference(first, second).getbbox() is None


def test_same_seed_same_scene() -> None:
    first, again, other = draw_scene(3), draw_scene(3), draw_scene(4)
    assert _equal(first.image, again.image) and not _equal(first.image, other.image)
    assert (first.question, first.answer, first.box) == (again.question, again.answer, again.box)


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), shapes=st.integers(1, 28))
def test_the_box_holds_what_is_asked_about(seed: int, shapes: int) -> None:
    scene = draw_scene(seed, shapes)
    assert scene.image.size == (1344, 1008) and scene.image.mode == "RGB"
    assert scene.answer in list("0123456789")
    left, top, right, bottom = scene.box or (0, 0, 0, 0)
    assert 0 <= left < right <= 1344 and 0 <= top < bottom <= 1008
    inside = np.asarray(scene.image.crop((left, top, right, bottom)))
    found = re.fullmatch(r"Which digit is on the (.+) (circle|triangle|square|hexagon)\?", scene.question)
    assert found and (inside == COLOURS[found[1]]).all(-1).sum() > 900
    assert (inside < 40).all(-1).sum() > 50, "no digit and no outline"
