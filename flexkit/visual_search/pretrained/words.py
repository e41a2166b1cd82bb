"""The words of scenes in somebody else's vocabulary."""

from typing import Any

from flexkit.errors import UnsupportedModelError
from flexkit.visual_search.labels import CLASS_WORDS
from flexkit.visual_search.questions import spoken

__all__ = ["class_word_ids", "word_id"]

GROUND = "background"
_BEFORE = "Answer:"


def word_id(tokenizer: Any, word: str) -> int:
    """The one token that says a word behind a prompt.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Of the language model.
    word : str
        Of :data:`~flexkit.visual_search.questions.WORDS`, or another.

    Raises
    ------
    UnsupportedModelError
        If it takes several.
    """
    before, whole = (
        tokenizer.encode(text, add_special_tokens=False) for text in (_BEFORE, f"{_BEFORE} {spoken(word)}")
    )
    if len(whole) != len(before) + 1 or whole[:-1] != before:
        raise UnsupportedModelError(
            f"this language model takes {len(whole) - len(before)} tokens to say {spoken(word)!r}: answers have to be "
            "single ones; choose another language model."
        )
    return int(whole[-1])


def class_word_ids(tokenizer: Any) -> dict[str, list[int]]:
    """The tokens by which things are named, by their class; the ground is the last of the colours.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Of the language model.
    """
    ids = {name: [word_id(tokenizer, word) for word in words] for name, words in CLASS_WORDS.items()}
    ids["colour"].append(word_id(tokenizer, GROUND))
    return ids
