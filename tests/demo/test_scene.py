import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageChops

from flexkit.demo import draw_scene


def test_same_seed_same_scene() -> None:
    first, again, other = draw_scene(3), draw_scene(3), draw_scene(4)
    assert ImageChops.difference(first.image, again.image).getbbox() is None
    assert (first.question, first.answer, first.box) == (again.question, again.answer, again.box)
    assert ImageChops.difference(first.image, other.image).getbbox() is not None


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), shapes=st.integers(1, 28))
def test_the_box_holds_what_is_asked_about(seed: int, shapes: int) -> None:
    scene = draw_scene(seed, shapes)
    assert scene.image.size == (1344, 1008) and scene.image.mode == "RGB"
    assert scene.answer is not None and scene.answer in "0123456789" and len(scene.answer) == 1
    left, top, right, bottom = scene.box or (0, 0, 0, 0)
    assert 0 <= left < right <= 1344 and 0 <= top < bottom <= 1008
    inside = np.asarray(scene.image.crop((left, top, right, bottom)), dtype=int)
    shade = inside[inside.shape[0] // 2 + 24, inside.shape[1] // 2]  # below the digit
    expected = {
        "orange": (230, 159, 0),
        "sky blue": (86, 180, 233),
        "green": (0, 158, 115),
        "yellow": (240, 228, 66),
        "blue": (0, 114, 178),
        "red": (213, 94, 0),
        "pink": (204, 121, 167),
    }
    named = [colour for colour in sorted(expected, key=len) if f" {colour} " in scene.question][-1]
    black = (inside == 0).all(-1).sum()
    painted = (inside == expected[named]).all(-1).sum()
    assert painted > 900 and black > 50, (named, shade)


def test_a_question_has_one_answer() -> None:
    scene = draw_scene(0, 28)
    alone = draw_scene(0, 1)
    assert scene.question == alone.question
    assert ImageChops.difference(scene.image, alone.image).getbbox() is not None
