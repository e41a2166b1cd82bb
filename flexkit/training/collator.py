"""Conversations become batches: both views of their images, and labels for the answers alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flexkit.errors import DataError
from flexkit.training.answers import ChatTemplate
from flexkit.training.conversations import Conversation

__all__ = ["ConversationCollator"]


class ConversationCollator:
    """Turn conversations into the inputs of a batch, with labels for what the assistant has to write.

    Labels are the tokens of the answers, each with the token that ends its turn, and -100 everywhere else.

    Parameters
    ----------
    processor : FlexProcessor or transformers.ProcessorMixin
        Of both views for a patched model; one that is not patched takes its own.
    chat_template : str, optional
        In the place of the processor's. ``{% generation %}`` and ``{% endgeneration %}`` in it enclose what the
        assistant writes; without them it is what an answer adds to the generation prompt.

    Raises
    ------
    ConfigError
        If the processor has no chat template, or no fast tokenizer.

    Examples
    --------
    >>> from flexkit.training import Conversation, ConversationCollator
    >>> from flexkit.visual_search import draw_scene, load_model
    >>> model, processor = load_model()
    >>> turns = [{"role": "user", "content": "<image> Which digit is red?"}, {"role": "assistant", "content": "7"}]
    >>> record = {"image": "scene.png", "messages": turns}
    >>> conversation = Conversation.from_record(record)
    >>> conversation.images[0] = draw_scene(0).image
    >>> batch = ConversationCollator(processor)([conversation])
    >>> processor.decode(batch["labels"][batch["labels"] != -100])
    '7 </s>'
    """

    def __init__(self, processor: Any, *, chat_template: str | None = None) -> None:
        self.processor = processor
        self.template = ChatTemplate(processor, chat_template)

    def __call__(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        """A batch, padded to the longest.

        Parameters
        ----------
        conversations : sequence of Conversation
            With their images.

        Returns
        -------
        dict of str to torch.Tensor
            What the processor gives, and ``labels``.

        Raises
        ------
        DataError
            If the answers of one are not found in what the processor makes of it.
        ConfigError
            If the chat template does not let answers be found.
        """
        texts = [self.template.render(conversation.messages)[0] for conversation in conversations]
        images = [list(conversation.images) for conversation in conversations]
        inputs = self.processor(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            return_tensors="pt",
            **self.template.options(texts[0]),
        )
        labels = torch.full_like(inputs["input_ids"], -100)
        for row, conversation in enumerate(conversations):
            places = inputs["attention_mask"][row].nonzero()[:, 0]
            ids = inputs["input_ids"][row]
            answers = places[self.template.positions(ids[places].tolist(), conversation)]
            labels[row, answers] = ids[answers]
        return {**inputs, "labels": labels}

    def shorten(self, conversation: Conversation, max_length: int) -> Conversation:
        """A conversation without the last questions and answers that do not fit; no answer and no image is cut.

        Parameters
        ----------
        conversation : Conversation
            With its images.
        max_length : int
            How many tokens it may have, those of its images included.

        Returns
        -------
        Conversation
            The same one if it fits.

        Raises
        ------
        DataError
            If its first question and answer have more.

        Examples
        --------
        .. code-block:: python

            dataset = dataset.map(functools.partial(collator.shorten, max_length=2048))
        """
        ends = [end for end, message in enumerate(conversation.messages, 1) if message["role"] == "assistant"]
        fitting, failing = 0, len(ends) + 1
        kept, turns = conversation, len(ends)
        while fitting + 1 < failing:  # the whole one first: most fit
            part = _first(conversation, ends[turns - 1])
            length = len(self.template.tokens(self.template.render(part.messages)[0], part.images))
            if length <= max_length:
                fitting, kept = turns, part
            else:
                failing = turns
            turns = (fitting + failing) // 2
        if not fitting:
            raise DataError(
                f"{conversation.source}: its first question and answer have {length} tokens, more than {max_length}."
            )
        return kept


def _first(conversation: Conversation, end: int) -> Conversation:
    messages = conversation.messages[:end]
    return replace(conversation, messages=messages, images=conversation.images[: conversation.shown(end)])
