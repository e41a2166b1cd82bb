"""Where the assistant's answers stand: in the text that a chat template makes, and in the tokens of that."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from flexkit.errors import ConfigError, DataError
from flexkit.processing import FlexProcessor
from flexkit.training.conversations import Conversation, Message

__all__ = ["ChatTemplate"]

Span = tuple[int, int]
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE: list[Message] = [
    {"role": "user", "content": [{"type": "text", "text": "a"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
]


class ChatTemplate:
    """A processor's chat template, which says what of a conversation the assistant has to write.

    Answers are what stands between ``{% generation %}`` and ``{% endgeneration %}``; in templates without these, what
    an assistant's message adds to the text behind the generation prompt. Both end with the special token that ends a
    turn, and without what a template writes behind it. Where a template has no such token, the tokenizer's end of a
    sequence takes its place.

    Parameters
    ----------
    processor : FlexProcessor or transformers.ProcessorMixin
        Of the model.
    template : str, optional
        In the place of the processor's own.

    Raises
    ------
    ConfigError
        If there is no template, or the tokenizer cannot say where its tokens stand.
    """

    def __init__(self, processor: Any, template: str | None = None) -> None:
        tokenizer: Any = getattr(processor, "tokenizer", None)
        # Of the high-res view no token is in the text, so the smallest one does.
        inner = processor.processor if isinstance(processor, FlexProcessor) else None
        self.counting = processor if inner is None else FlexProcessor(inner, 1)
        own = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        own = own.get("default") if isinstance(own, dict) else own
        self.template = template or own
        if not isinstance(self.template, str):
            raise ConfigError(
                f"{type(inner or processor).__name__} has no chat template, which says how questions and answers "
                "become a text: give chat_template, a Jinja template."
            )
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"{type(tokenizer).__name__} does not say where its tokens stand in a text, by which answers are "
                "found: load the fast tokenizer."
            )
        self.tokenizer: Any = tokenizer
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._special = tuple({*added, *tokenizer.all_special_tokens} - {""})
        self.marked = _MARK.search(self.template) is not None
        self._closing, self._behind = "", ""
        self._closing, self._behind = self._end_of_turn()

    def render(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text of a conversation, and the characters of its answers.

        Parameters
        ----------
        messages : sequence of dict
            As :class:`Conversation` has them.

        Raises
        ------
        ConfigError
            If the template does not let answers be found.
        """
        closed = [_closed(message, self._closing) for message in messages]
        text, spans = self._spans(closed)
        answers = sum(message["role"] == "assistant" for message in messages)
        if len(spans) != answers:
            raise ConfigError(
                f"the chat template marks {len(spans)} answers in a conversation with {answers}; its "
                "{% generation %} must enclose each of them, and nothing else."
            )
        ends = [end + len(self._behind) * text.startswith(self._behind, end) for _, end in spans]
        return text, [(start, end) for (start, _), end in zip(spans, ends, strict=True)]

    def positions(self, ids: Sequence[int], conversation: Conversation) -> list[int]:
        """Which tokens of a conversation are the assistant's.

        Parameters
        ----------
        ids : sequence of int
            What the processor makes of the text and its images, without padding.
        conversation : Conversation
            With its images.

        Raises
        ------
        DataError
            If the processor makes other tokens of an answer than its tokenizer.
        ConfigError
            As of :meth:`render`.
        """
        text, spans = self.render(conversation.messages)
        positions: list[int] = []
        for (first, _), (last, images) in pairwise(_stretches(conversation)):
            whole = last == len(spans)
            part = text if whole else text[: spans[last - 1][1]]
            tokens = list(ids) if whole else self.tokens(part, conversation.images[:images])
            plain = self.tokenizer(part, return_offsets_mapping=True, **self.options(text))
            found = [
                index
                for index, (start, end) in enumerate(plain["offset_mapping"])
                if any(start < stop and end > begin for begin, stop in spans[first:last])
            ]
            # Images take more tokens than their marks; behind the last one, they only move what follows.
            moved = len(tokens) - len(plain["input_ids"])
            here = [index + moved for index in found]
            start, stop = here[0], here[-1] + 1
            if not tokens[start:stop] == list(ids[start:stop]) == plain["input_ids"][found[0] : found[-1] + 1]:
                raise DataError(
                    f"{conversation.source}: the processor makes other tokens of the answers than its tokenizer does, "
                    "so they cannot be found; write the collator yourself."
                )
            positions += here
        return positions

    def tokens(self, text: str, images: Sequence[Any]) -> list[int]:
        """What the processor makes of a text and its images.

        Parameters
        ----------
        text : str
            With a mark for each image.
        images : sequence of PIL.Image.Image
            The images.
        """
        shown = [list(images)] if images else None
        inputs = self.counting(text=[text], images=shown, return_tensors="pt", **self.options(text))
        tokens: list[int] = inputs["input_ids"][0].tolist()
        return tokens

    def options(self, text: str) -> dict[str, Any]:
        """What a processor is told of a text that begins with the token that it would put there."""
        first = self.tokenizer.bos_token
        return {"add_special_tokens": False} if first is not None and text.startswith(first) else {}

    def _spans(self, messages: list[Message]) -> tuple[str, list[Span]]:
        text, marked = self._rendered(messages, marks=self.marked)
        spans = marked if self.marked else list(self._behind_prompts(messages, text))
        ended = [(start, start + self._end(text[start:end])) for start, end in spans]
        return text, [(start, end) for start, end in ended if end > start]

    def _end(self, answer: str) -> int:
        """Where an answer ends: behind its last special token, or else before the white space at its end."""
        ends = [answer.rfind(token) + len(token) for token in self._special if token in answer]
        return max(ends, default=len(answer.rstrip()))

    def _behind_prompts(self, messages: list[Message], text: str) -> Iterator[Span]:
        """What each answer adds to the generation prompt in front of it."""
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt, _ = self._rendered(messages[:index], add_generation_prompt=True)
                answered, _ = self._rendered(messages[: index + 1])
                if not answered.startswith(prompt) or not text.startswith(answered):
                    raise ConfigError(
                        "the chat template writes an answer otherwise than behind the generation prompt, or otherwise "
                        "when others follow; give a chat_template that has {% generation %} and {% endgeneration %} "
                        "around what the assistant writes."
                    )
                yield len(prompt), len(answered)

    def _rendered(self, messages: list[Message], *, marks: bool = False, **options: Any) -> tuple[str, list[Span]]:
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=self.template,
            return_assistant_tokens_mask=marks,
            **self.tokenizer.special_tokens_map,
            **options,
        )
        return texts[0], [tuple(span) for span in spans[0]] if marks else []

    def _end_of_turn(self) -> tuple[str, str]:
        """What has to be put behind an answer, and what the template puts there outside of its marks."""
        text, spans = self._spans(_PROBE)
        answer, behind = text[slice(*spans[-1])] if spans else "", text[spans[-1][1] :] if spans else ""
        if answer.endswith(self._special):
            return "", ""
        for token in sorted(self._special, key=len, reverse=True):
            if behind.lstrip().startswith(token):
                return "", behind[: len(behind) - len(behind.lstrip()) + len(token)]
        return self.tokenizer.eos_token or "", ""


def _closed(message: Message, closing: str) -> Message:
    """A message whose text, if it is an answer, has something behind it."""
    if message["role"] != "assistant" or not closing:
        return message
    *parts, last = message["content"]
    return message | {"content": [*parts, last | {"text": last["text"] + closing}]}


def _stretches(conversation: Conversation) -> Iterator[tuple[int, int]]:
    """Where images come behind answers: how many answers and images there are until then; and those of all."""
    answers = 0
    yield 0, 0
    for index, message in enumerate(conversation.messages):
        seen, shown = conversation.shown(index), conversation.shown(index + 1)
        if answers and shown > seen:
            yield answers, seen
        answers += message["role"] == "assistant"
    yield answers, len(conversation.images)
