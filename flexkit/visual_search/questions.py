"""Questions about scenes, and the words that they are made of."""

from dataclasses import dataclass

from flexkit.visual_search.items import COLOURS, DIGITS, SHAPES, Item, named_by_both, named_by_colour
from flexkit.visual_search.scene import Scene

__all__ = ["ABOUT", "TRACKS", "WORDS", "Question", "questions"]

ABOUT = {
    "digit": "Which digit is on",
    "row": "In which row is",
    "column": "In which column is",
    "shape": "Which shape has",
}
"""What is asked for, and how."""
TRACKS = {
    "attribute": (("digit",), False),
    "conjunction": (("digit",), True),
    "low-res": (("row", "column", "shape"), False),
}
"""What is asked for, and whether it takes both colour and shape to name the object, or the colour does."""
WORDS = (
    *(str(digit) for digit in range(DIGITS)),
    *SHAPES,
    *COLOURS,
    *dict.fromkeys(word for text in ABOUT.values() for word in f"{text} the object that is".lower().split()),
)
"""All words of questions and answers."""


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes
    ----------
    track : str
        A key of ``TRACKS``: ``"attribute"``, ``"conjunction"`` or ``"low-res"``.
    text : str
        It ends with the word that names the object.
    item : Item
        The object.
    about : str
        ``"digit"``, ``"row"``, ``"column"`` or ``"shape"``.
    """

    track: str
    text: str
    item: Item
    about: str

    @property
    def answer(self) -> str:
        """One word; rows and columns count from 1."""
        value = getattr(self.item, self.about)
        return str(value + 1 if self.about in ("row", "column") else value)


def questions(scene: Scene, track: str) -> tuple[Question, ...]:
    """All questions of a track about a scene.

    Parameters
    ----------
    scene : Scene
        What is asked about.
    track : str
        A key of ``TRACKS``: ``"attribute"``, ``"conjunction"`` or ``"low-res"``.

    Returns
    -------
    tuple of Question
        At least one.
    """
    about, by_both = TRACKS[track]
    return tuple(
        Question(track, f"{ABOUT[what]} the {item.shape if by_both else 'object'} that is {item.colour}?", item, what)
        for item in (named_by_both if by_both else named_by_colour)(scene.items)
        for what in about
    )
