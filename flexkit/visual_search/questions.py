"""Questions about scenes, and the words that they are made of."""

from dataclasses import dataclass

from flexkit.visual_search.clip import Clip
from flexkit.visual_search.items import COLOURS, DIGITS, SHAPES, Item, named_by_both, named_by_colour
from flexkit.visual_search.scene import Scene

__all__ = [
    "ABOUT",
    "CLOSE_UP",
    "COLUMNS",
    "PRACTICE",
    "ROWS",
    "TRACKS",
    "VALUES",
    "WORDS",
    "Question",
    "heard",
    "questions",
    "spoken",
]

ABOUT = {
    "digit": "Which digit is on",
    "row": "In which row is",
    "column": "In which column is",
    "shape": "Which shape has",
}
"""What is asked for, and how."""
ROWS = ("first", "second", "third", "fourth", "fifth", "sixth")
COLUMNS = ("a", "b", "c", "d", "e", "f")
"""What rows and columns are called: by words that mean nothing else, so that image tokens can name their own."""
VALUES = {
    "shape": SHAPES,
    "digit": tuple(str(digit) for digit in range(DIGITS)),
    "row": ROWS,
    "column": COLUMNS,
}
"""The words of the answers, by what is asked for."""
TRACKS = {
    "attribute": (("digit",), False),
    "conjunction": (("digit",), True),
    "low-res": (("row", "column", "shape"), False),
}
"""What is asked for, and whether it takes both colour and shape to name the object, or the colour does."""
CLOSE_UP = "close-up"
PRACTICE = {CLOSE_UP: (("digit", "shape"), False)}
"""The same of what is asked in training only: here, about a scene's tile as if it were the whole."""
WORDS = (
    *VALUES["digit"],
    *SHAPES,
    *COLOURS,
    *ROWS,
    *COLUMNS,
    *dict.fromkeys(word for text in ABOUT.values() for word in f"{text} the object that is".lower().split()),
)
"""All words of questions and answers."""


_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SPOKEN = {**{str(digit): number for digit, number in enumerate(_NUMBERS)}, **{word: word.upper() for word in COLUMNS}}
_HEARD = {spoken: word for word, spoken in _SPOKEN.items()}


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
    def short(self) -> str:
        """The same in few words, the last of which name the object."""
        _, by_both = (TRACKS | PRACTICE)[self.track]
        return f"{self.about} of {self.item.colour}" + (f" {self.item.shape}" if by_both else "")

    @property
    def answer(self) -> str:
        """One word."""
        value = getattr(self.item, self.about)
        return str(value) if isinstance(value, str) else VALUES[self.about][value]


def questions(scene: Scene | Clip, track: str) -> tuple[Question, ...]:
    """All questions of a track about a scene, or about a clip.

    Parameters
    ----------
    scene : Scene or Clip
        What is asked about. Of a clip, not what differs between its first frame and its last: the row of an object that
        leaves it.
    track : str
        A key of ``TRACKS``: ``"attribute"``, ``"conjunction"`` or ``"low-res"``.

    Returns
    -------
    tuple of Question
        Of a scene at least one; no two objects of a clip have one colour, so that there is no ``"conjunction"``.
    """
    asked = _questions(scene.items, track)
    if isinstance(scene, Clip):
        later = _questions(scene.later, track)
        return tuple(one for one, other in zip(asked, later, strict=True) if one.answer == other.answer)
    return asked


def _questions(items: tuple[Item, ...], track: str) -> tuple[Question, ...]:
    about, by_both = (TRACKS | PRACTICE)[track]
    return tuple(
        Question(track, f"{ABOUT[what]} the {item.shape if by_both else 'object'} that is {item.colour}?", item, what)
        for item in (named_by_both if by_both else named_by_colour)(items)
        for what in about
    )


def spoken(word: str) -> str:
    """How a language model that knows English says a word of an answer: digits as numbers, columns as capitals.

    Parameters
    ----------
    word : str
        An answer.

    Examples
    --------
    >>> spoken("7"), spoken("a"), spoken("circle")
    ('seven', 'A', 'circle')
    """
    return _SPOKEN.get(word, word)


def heard(text: str) -> str:
    """The answer that a text gives, however it is said.

    Parameters
    ----------
    text : str
        What a model said.

    Examples
    --------
    >>> heard(" seven"), heard("7"), heard(" A")
    ('7', '7', 'a')
    """
    word = text.strip()
    return _HEARD.get(word, word)
