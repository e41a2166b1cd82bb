import re

import pytest

from flexkit.demo.task import SIZE, draw_task
from flexkit.visual_search import draw_scene


@pytest.mark.parametrize("seed", range(8))
def test_the_box_holds_what_is_asked_about(seed: int) -> None:
    task, scene = draw_task(seed), draw_scene(seed, SIZE)
    assert task.image.mode == "RGB" and task.image.tobytes() == scene.image.tobytes()
    found = re.fullmatch(r"Which digit is on the object that is (.+)\?", task.question)
    assert found
    (item,) = (item for item in scene.items if item.colour == found[1])
    assert task.answer == str(item.digit)
    assert task.box == pytest.approx([SIZE * edge for edge in item.box], abs=0.5)
    assert task.box and min(task.box) >= 0 and max(task.box) <= SIZE
