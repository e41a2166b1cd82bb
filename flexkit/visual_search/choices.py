"""Questions as benchmarks put them: options under letters, and words behind that say how to answer."""

from dataclasses import dataclass, replace

import numpy as np

from flexkit.visual_search.questions import VALUES, Question

__all__ = ["CHOICES", "LETTERS", "Choice", "Told", "instruct", "pose", "tell"]

CHOICES = "choices"
"""The track of questions for digits that have options; what counts is the letter."""
LETTERS = ("A", "B", "C", "D")
"""What options stand under; tokens of their own, for the small letters are columns."""

_INSTRUCTION = (
    *("please", "answer", "choose", "with", "by", "only", "one", "word", "letter", "option", "image", "correct"),
    *("the", "that", "is", "in", "on", "which", "has", "of", "question", "to", ", ".join(LETTERS)),
)
"""What stands around options is drawn of these. The models know few of them, and none of a benchmark's sentences."""
_LONGEST, _FEW = 36, 5


@dataclass(frozen=True)
class Choice(Question):
    """A question with options, one of which is right.

    Attributes
    ----------
    options : tuple of str
        What stands under the letters, in their order; the text lists it, too.
    """

    options: tuple[str, ...] = ()

    @property
    def letter(self) -> str:
        """That the right option stands under."""
        return LETTERS[self.options.index(super().answer)]

    @property
    def answer(self) -> str:
        """The right option, and its letter."""
        return f"{super().answer} {self.letter}"


@dataclass(frozen=True)
class Told:
    """A text that ends with the value whose letter is asked for: no picture is needed.

    Attributes
    ----------
    text : str
        Options, or nothing where they have been listed before, and the value.
    answer : str
        The letter that it stands under.
    """

    text: str
    answer: str


def pose(random: np.random.Generator, question: Question) -> Choice:
    """Draw options in any order, wrong ones by chance, and words around them.

    Parameters
    ----------
    random : numpy.random.Generator
        Source of chance.
    question : Question
        What is asked.
    """
    wrong = random.permutation([value for value in VALUES[question.about] if value != question.answer])
    options = tuple(random.permutation([question.answer, *wrong[: len(LETTERS) - 1]]).tolist())
    between, behind = _words(random, _FEW), _words(random, _LONGEST)
    text = _joined(question.text, between, _listed(options), behind)
    return Choice(question.track, text, question.item, question.about, options)


def instruct(random: np.random.Generator, question: Question) -> Question:
    """The same question, with words behind it.

    Parameters
    ----------
    random : numpy.random.Generator
        Source of chance.
    question : Question
        What is asked.
    """
    return replace(question, text=_joined(question.text, _words(random, _LONGEST)))


def tell(random: np.random.Generator, turns: int) -> tuple[Told, ...]:
    """Draw options, and values among them whose letters are asked for.

    Parameters
    ----------
    random : numpy.random.Generator
        Source of chance.
    turns : int
        How many values.
    """
    values = VALUES[str(random.choice(list(VALUES)))]
    options = tuple(random.permutation(values)[: len(LETTERS)].tolist())
    asked = random.integers(len(options), size=turns).tolist()
    first = _joined(_listed(options), _words(random, _FEW))
    return tuple(
        Told(_joined("" if turn else first, options[index]), LETTERS[index]) for turn, index in enumerate(asked)
    )


def _listed(options: tuple[str, ...]) -> str:
    return " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))


def _joined(*texts: str) -> str:
    return " ".join(filter(None, texts))


def _words(random: np.random.Generator, longest: int) -> str:
    """None, few or many."""
    count = int(random.integers(1 + int(random.choice([0, _FEW, longest]))))
    return " ".join(random.choice(_INSTRUCTION, count).tolist())
