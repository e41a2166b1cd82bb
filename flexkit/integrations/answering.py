"""Independent questions about pictures, many at a time, as servers and jobs over data get them."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from traceback import clear_frames
from typing import Any

import torch
from PIL import Image, ImageOps

import flexkit
from flexkit.checks import is_number
from flexkit.errors import HighResInputError, PolicyError, first_line
from flexkit.integrations.views import Viewer
from flexkit.selection import policy_from_dict

__all__ = ["DISABLED", "Answerer", "PictureQuestion", "call_settings"]

DISABLED = "disabled"
"""In the place of a policy: no high-res view."""


@dataclass(frozen=True)
class PictureQuestion:
    """A picture, and what is asked about it.

    Parameters
    ----------
    picture : str or os.PathLike or bytes or PIL.Image.Image
        A path, what is in a file, or a picture.
    question : str
        Without image tokens.
    policy : optional
        As for :func:`call_settings`.
    """

    picture: str | PathLike[str] | bytes | Image.Image
    question: str
    policy: Any = None


class Answerer:
    """Answers questions with a patched model that was saved, a :class:`flexkit.FlexProcessor` beside it.

    Parameters
    ----------
    name : str or os.PathLike
        A folder, or a repository on the Hugging Face hub.
    max_new_tokens : int
        Of an answer.
    **options
        Of :func:`flexkit.from_pretrained`: ``dtype``, ``device_map``, ... Without a ``device_map`` the model goes to a
        GPU, if there is one.

    Raises
    ------
    CheckpointError
        If there is no such model.
    """

    def __init__(self, name: str | PathLike[str], max_new_tokens: int = 64, **options: Any) -> None:
        self.model: Any = flexkit.from_pretrained(name, **options)
        if "device_map" not in options and torch.cuda.is_available():
            self.model.cuda()
        processor = flexkit.FlexProcessor.from_pretrained(name).processor
        self.tokenizer = processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._viewer = Viewer(processor, "flexkit", self.model)
        self._max_new_tokens = max_new_tokens

    def answer(self, questions: Sequence[PictureQuestion], **options: Any) -> list[str | Exception]:
        """Answer questions: those with the same policy by one ``generate``. One that fails does so alone.

        Parameters
        ----------
        questions : sequence of PictureQuestion
            Pictures may be of any sizes.
        **options
            Of ``generate``: ``streamer``, ``stopping_criteria``, ...

        Returns
        -------
        list of str or Exception
            An answer to each question, or why there is none. What is wrong with a question itself is a ``ValueError``.
        """
        found: dict[int, str | Exception] = {}
        groups: dict[str, tuple[dict[str, Any], dict[int, Any]]] = {}
        for index, asked in enumerate(questions):
            try:
                settings, conversation = call_settings(asked.policy), _conversation(asked)
                # By what it is called: a policy of one cell and one of all are equal, TopK(1) == TopK(1.0).
                groups.setdefault(repr(settings), (settings, {}))[1][index] = conversation
            except Exception as error:  # a stranger's, nested too deep for instance
                found[index] = error
        for settings, group in groups.values():
            found |= zip(group, self._answer([*group.values()], settings | options), strict=True)
        return [found[index] for index in range(len(questions))]

    def _answer(self, conversations: list[Any], options: dict[str, Any]) -> Iterable[str | Exception]:
        try:
            return self._generate(conversations, options)
        except Exception as error:
            clear_frames(error.__traceback__)  # else it holds the pictures and the cache of its call
            if len(conversations) == 1:
                return [error]
        return [answer for alone in conversations for answer in self._answer([alone], options)]

    @torch.inference_mode()
    def _generate(self, conversations: list[Any], options: dict[str, Any]) -> list[str]:
        inputs = self._viewer(conversations).to(self.model.device)
        tokens = self.model.generate(**inputs, **{"max_new_tokens": self._max_new_tokens} | options)
        if not self.model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def call_settings(policy: Any) -> dict[str, Any]:
    """What ``generate`` is told of a policy that stands in a request or a table.

    Parameters
    ----------
    policy
        Its description, as :meth:`flexkit.FlexConfig.to_dict` has it; a number or a share of cells, as of
        :class:`flexkit.TopK`; ``"disabled"`` for none of the high-res view; JSON of these; nothing for the model's own.

    Returns
    -------
    dict
        ``hd_policy``, ``hd_disabled`` or neither.

    Raises
    ------
    PolicyError
        If it is nothing of that.

    Examples
    --------
    >>> call_settings({"type": "Threshold", "value": 0.5}), call_settings("0.1"), call_settings("disabled")
    ({'hd_policy': Threshold(value=0.5)}, {'hd_policy': TopK(k=0.1)}, {'hd_disabled': True})
    """
    if policy == DISABLED:
        return {"hd_disabled": True}
    if policy in (None, ""):
        return {}
    if isinstance(policy, str):
        with suppress(json.JSONDecodeError):  # what it is then is said below
            return call_settings(json.loads(policy))
    if isinstance(policy, Mapping):
        return {"hd_policy": policy_from_dict(policy)}
    if is_number(policy):
        return {"hd_policy": flexkit.TopK(policy)}
    raise PolicyError(f'a policy is its description, a number or share of cells, or "{DISABLED}"; got {policy!r}.')


def _conversation(asked: PictureQuestion) -> list[dict[str, Any]]:
    if not isinstance(asked.question, str):
        raise HighResInputError(f"a question is a text, got {asked.question!r}.")
    try:
        given = io.BytesIO(asked.picture) if isinstance(asked.picture, bytes) else asked.picture
        picture = given if isinstance(given, Image.Image) else Image.open(given)
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # a stranger's file, and any of PIL's readers
        raise HighResInputError(f"the picture cannot be read: {first_line(error)}") from error
    return [
        {"role": "user", "content": [{"type": "image", "image": upright}, {"type": "text", "text": asked.question}]}
    ]
