"""What can be asked."""

from flexkit.errors import ConfigError
from flexkit.visual_search.model import IMAGE_TOKEN

__all__ = ["check_question"]

_LONGEST = 1000


def check_question(question: str) -> None:
    """Refuse what is no question to the demo's model.

    Parameters
    ----------
    question : str
        As the user gave it.

    Raises
    ------
    ConfigError
        If it is empty, too long or no valid text, or names the token that stands for the image.
    """
    if not question.strip():
        raise ConfigError("the question is empty; ask something about the picture.")
    if len(question) > _LONGEST:
        raise ConfigError(f"the question has {len(question)} characters; the demo takes up to {_LONGEST}.")
    if IMAGE_TOKEN in question:
        raise ConfigError(f"the question names {IMAGE_TOKEN}, which stands for the picture itself; leave it out.")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("the question is no valid UTF-8 text; check the encoding of your terminal.") from error
