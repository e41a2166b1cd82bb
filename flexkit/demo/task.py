"""What the demo asks about."""

from dataclasses import dataclass

from PIL.Image import Image

from flexkit.visual_search import draw_scene, questions

__all__ = ["SIZE", "Task", "draw_task"]

SIZE = 1008
"""Side of the drawn picture in pixels."""


@dataclass(frozen=True)
class Task:
    """A picture, a question about it and, where it is known, what is true.

    Attributes
    ----------
    image : PIL.Image.Image
        RGB.
    question : str
        About the picture.
    answer : str, optional
        The true one.
    box : tuple of int, optional
        Left, top, right and bottom of what the question is about, in pixels.
    """

    image: Image
    question: str
    answer: str | None = None
    box: tuple[int, int, int, int] | None = None


def draw_task(seed: int = 0) -> Task:
    """Draw a scene, and ask for the digit on a shape that its colour names.

    Parameters
    ----------
    seed : int
        The same seed draws the same scene.

    Examples
    --------
    >>> draw_task().question
    'Which digit is on the object that is yellow?'
    """
    scene = draw_scene(seed, SIZE)
    asked = questions(scene, "attribute")[0]
    left, top, right, bottom = (round(edge * SIZE) for edge in asked.item.box)
    return Task(scene.image, asked.text, asked.answer, (left, top, right, bottom))
