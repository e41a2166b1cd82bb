"""Many questions about one picture in one sequence: the picture passes through the language model once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer

from flexkit.visual_search.data import Chats, as_prompt, prompts
from flexkit.visual_search.model import IMAGE_TOKEN
from flexkit.visual_search.pretrained.words import word_id
from flexkit.visual_search.questions import Question

__all__ = ["AnswerTrainer", "PackedChat", "PackedChats", "pack"]


@dataclass(frozen=True)
class PackedChat:
    """A picture, and the tokens of questions about it.

    Attributes
    ----------
    views : dict of str to torch.Tensor
        Of the picture, as the processor makes them: ``(images, 3, height, width)``.
    before : list of int
        What stands before all questions: the picture, and what is before that.
    asked : list of list of int
        Questions.
    answers : list of int
        One token each.
    """

    views: Mapping[str, Tensor]
    before: list[int]
    asked: list[list[int]]
    answers: list[int]


class PackedChats(Dataset[PackedChat]):
    """Chats as tokens of a language model. All questions of the first are short, of later ones every second.

    Parameters
    ----------
    chats : Chats
        Scenes with questions.
    processor : FlexProcessor or transformers.LlavaProcessor
        Of the model.
    short : int
        How many of the chats are the first.
    in_sequence : bool
        As for :class:`~flexkit.visual_search.data.Collator`.
    """

    def __init__(self, chats: Chats, processor: Any, short: int, *, in_sequence: bool = False) -> None:
        self.chats, self.processor, self.short, self.in_sequence = chats, processor, short, in_sequence

    def __len__(self) -> int:
        return len(self.chats)

    def __getitem__(self, index: int) -> PackedChat:
        chat, tokenizer = self.chats[index], self.processor.tokenizer
        shown = dict(prompts(self.processor, [chat.scene.image], [""], in_sequence=self.in_sequence))
        ids = shown.pop("input_ids")[0].tolist()
        del shown["attention_mask"]  # of one row
        end = len(ids) - ids[::-1].index(self.processor.image_token_id)

        def asked(number: int, turn: Question) -> str:
            short = index < self.short or number % 2 == 1
            whole = as_prompt(self.processor, f" {turn.short}" if short else turn.text, bare=short)
            return whole.rpartition(IMAGE_TOKEN)[2]

        return PackedChat(
            shown,
            ids[:end],
            [tokenizer.encode(asked(*turn), add_special_tokens=False) for turn in enumerate(chat.turns)],
            [word_id(tokenizer, turn.answer) for turn in chat.turns],
        )


def pack(chats: Sequence[PackedChat]) -> dict[str, Tensor]:
    """A batch in which each question sees what is before all questions, and itself, and stands right behind that.

    Parameters
    ----------
    chats : sequence of PackedChat
        One a row.

    Returns
    -------
    dict of str to torch.Tensor
        The views; ``input_ids``, ``position_ids`` and ``labels``, ``(rows, length)``, the labels at the last token of
        each question; ``attention_mask``, ``(rows, 1, length, length)``, bool. With a high-res view also
        ``hd_queries``, ``(rows, length)``, bool: where there are labels.
    """
    rows = [[chat.before, *chat.asked] for chat in chats]
    length = max(sum(map(len, row)) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions, part, labels = ids.clone(), torch.full_like(ids, -1), torch.full_like(ids, -100)
    for index, (chat, row) in enumerate(zip(chats, rows, strict=True)):
        ends = list(accumulate(map(len, row)))
        ids[index, : ends[-1]] = torch.tensor([token for tokens in row for token in tokens])
        for number, (tokens, end) in enumerate(zip(row, ends, strict=True)):
            here = slice(end - len(tokens), end)
            part[index, here] = number
            positions[index, here] = torch.arange(len(tokens)) + (len(chat.before) if number else 0)
        labels[index, torch.tensor(ends[1:]) - 1] = torch.tensor(chat.answers)
    seen = (part[:, None, :] == part[:, :, None]) | (part[:, None, :] == 0)
    views = {name: torch.cat([chat.views[name] for chat in chats]) for name in chats[0].views}
    return {
        **views,
        **({"hd_queries": labels != -100} if any(name.startswith("hd_") for name in views) else {}),
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": (seen & torch.ones(length, length, dtype=torch.bool).tril())[:, None],
        "labels": labels,
    }


class AnswerTrainer(Trainer):
    """A trainer whose labels are what comes next, at the tokens that say it; logits are computed there alone."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **settings: Any) -> Any:
        """Cross-entropy, on average over the answers."""
        labels = inputs.pop("labels")
        places = (labels != -100).any(0).nonzero()[:, 0]
        outputs = model(**inputs, use_cache=False, logits_to_keep=places)
        loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels[:, places].flatten())
        return (loss, outputs) if return_outputs else loss
