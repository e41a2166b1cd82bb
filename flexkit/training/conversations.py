"""Conversations about images, in the format of LLaVA's data: read, and checked field by field."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flexkit.errors import DataError

__all__ = ["Conversation", "read_records"]

IMAGE = "<image>"
"""Stands for an image in a text."""
_LINES = (".jsonl", ".ndjson")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Questions and answers about images, or about none.

    Attributes
    ----------
    messages : list of dict
        With a ``role`` and a list ``content``, as chat templates take them: questions and answers by turns, behind a
        system message if there is one.
    images : list
        Those that the messages show, in their order: as pictures, or their paths as the file has them.
    source : str
        Where it stands, for messages.
    """

    messages: list[Message]
    images: list[Any]
    source: str = "a conversation"

    @classmethod
    def from_record(cls, record: Any, source: str = "a conversation") -> "Conversation":
        r"""Read a record of LLaVA's format, or one of ``messages`` with ``role`` and ``content``.

        Parameters
        ----------
        record : dict
            ``{"image": "a.png", "conversations": [{"from": "human", "value": "<image>\n..."}, ...]}``; ``images`` is a
            list of them. Where no text says where the images stand, they stand in front of the first question.
        source : str
            Where it stands, for messages.

        Raises
        ------
        DataError
            If it is no such record; the message names the field.

        Examples
        --------
        >>> from flexkit.training import Conversation
        >>> turns = [{"from": "human", "value": "<image>\nWhich digit?"}, {"from": "gpt", "value": "7"}]
        >>> conversation = Conversation.from_record({"image": "a.png", "conversations": turns})
        >>> conversation.messages[0]
        {'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'Which digit?'}]}
        >>> conversation.images
        ['a.png']
        """
        if not isinstance(record, Mapping):
            raise DataError(f"{source} is a JSON {type(record).__name__}; an object with conversations was expected.")
        if isinstance(record.get("id"), str | int):
            source = f"{source} (id {record['id']!r})"
        images = _images(record, source)
        messages = [_message(*turn) for turn in _turns(record, source)]
        asked = messages[1:] if messages[0]["role"] == "system" else messages
        if [message["role"] for message in asked] != ["user", "assistant"] * (len(asked) // 2) or not asked:
            raise DataError(
                f"{source}: roles are {[message['role'] for message in messages]}; questions and answers were expected "
                "by turns, the last an answer, behind a system message or none."
            )
        shown = sum(_shows(message) for message in messages)
        if images and not shown:
            asked[0]["content"][:0] = [{"type": "image"}] * len(images)
        elif shown != len(images):
            raise DataError(f"{source}: {len(images)} images are named, and its texts have {shown} {IMAGE}.")
        return cls(messages, images, source)

    def shown(self, end: int | None = None) -> int:
        """How many images the messages show, in front of an index if one is given.

        Parameters
        ----------
        end : int, optional
            An index of a message.
        """
        return sum(_shows(message) for message in self.messages[:end])


def read_records(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The records of a file, each with a name, and read when it is called.

    Parameters
    ----------
    path : pathlib.Path
        A JSON array, or a line of JSON for each (``.jsonl``).

    Raises
    ------
    DataError
        If there is no such file, or the array cannot be read; of a line, when it is called.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); give a file of conversations, JSON or JSON lines."
        ) from error
    if path.suffix in _LINES:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}, line {number}", partial(_decoded, line, f"{path}, line {number}")
        return
    records = _decoded(text, str(path))
    if not isinstance(records, list):
        raise DataError(
            f"{path} holds a JSON {type(records).__name__}; an array was expected, or lines of JSON in a .jsonl."
        )
    for index, record in enumerate(records):
        yield f"{path}, record {index}", lambda record=record: record  # type: ignore[misc]


def _decoded(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is no JSON ({error}).") from error


def _images(record: Mapping[str, Any], source: str) -> list[str]:
    fields = [name for name in ("image", "images") if record.get(name) is not None]
    if len(fields) > 1:
        raise DataError(f"{source} has both image and images; leave one out.")
    images = [] if not fields else record[fields[0]]
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise DataError(f"{source}: {fields[0]} must be a path or a list of paths, got {_short(images)}.")
    return images


def _turns(record: Mapping[str, Any], source: str) -> Iterator[tuple[Any, Any, str, str, str]]:
    """For each turn its role and text, its place, and what the two fields are called."""
    field, role, text = ("conversations", "from", "value")
    if "conversations" not in record:
        field, role, text = ("messages", "role", "content")
    turns = record.get(field)
    if not isinstance(turns, list) or not turns:
        given = f"got {_short(turns)}" if field in record else f"it has {sorted(map(str, record))}"
        raise DataError(f"{source}: conversations must be a list of turns ({given}).")
    for index, turn in enumerate(turns):
        place = f"{source}: {field}[{index}]"
        if not isinstance(turn, Mapping):
            raise DataError(f"{place} must be an object with {role!r} and {text!r}, got {_short(turn)}.")
        yield turn.get(role), turn.get(text), place, role, text


def _message(role: Any, content: Any, place: str, role_field: str, text_field: str) -> Message:
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"{place}.{role_field} must be one of {', '.join(_ROLES)}, got {_short(role)}.")
    parts = _split(content) if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(map(_is_part, parts)):
        kinds = "text" if text_field == "value" else "text, or a list of parts {'type': 'image'} and {'type': 'text'}"
        raise DataError(f"{place}.{text_field} must be {kinds}, got {_short(content)}.")
    parts = [part if part["type"] == "image" else part | {"text": part["text"].strip()} for part in parts]
    parts = [part for part in parts if part["type"] == "image" or part["text"]]
    message = {"role": _ROLES[role], "content": parts}
    if not parts:
        raise DataError(f"{place}.{text_field} is empty.")
    if message["role"] != "user" and _shows(message):
        raise DataError(f"{place}.{text_field} shows an image; only what is asked may.")
    return message


def _split(text: str) -> list[dict[str, str]]:
    """A text as parts: what stands between the marks of images, and these."""
    parts: list[dict[str, str]] = []
    for index, words in enumerate(text.split(IMAGE)):
        parts += [{"type": "image"}] * bool(index) + [{"type": "text", "text": words}]
    return parts


def _is_part(part: Any) -> bool:
    return isinstance(part, Mapping) and (
        part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str))
    )


def _shows(message: Message) -> int:
    return sum(part["type"] == "image" for part in message["content"])


def _short(value: Any) -> str:
    return f"{value!r}"[:60]
