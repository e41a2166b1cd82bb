"""Who reads the context: the words of a text, or learned queries."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexkit.attention.ragged import RaggedIndex
from flexkit.errors import ConfigError, HighResInputError, UnsupportedModelError
from flexkit.patching.call.call import FlexCall
from flexkit.patching.call.inputs import IGNORED, asks_last, query_rows
from flexkit.patching.config import FlexConfig
from flexkit.patching.memory.high_res import HighResMemory, cached_length, cached_memory
from flexkit.patching.state import Patch

__all__ = ["LearnedQueries", "Reader", "Reading", "Words"]

_OF_THE_CALL = ("past_key_values", "labels", "use_cache", "encoder_outputs", "logits_to_keep")
"""Inputs that do not tell what an image looks like."""


class Reader(ABC):
    """Whose queries attend to the context."""

    prefix: str = ""
    """What the names of the text's inputs begin with."""

    def shown(self, inputs: Mapping[str, Any], images: int) -> dict[str, Any]:
        """The base model's inputs with which a tile is shown: its forward takes one text, generate two or none."""
        shown = {name: value for name, value in inputs.items() if name not in _OF_THE_CALL}
        if isinstance(shown.get("inputs_embeds"), Tensor):
            shown["inputs_embeds"] = shown["inputs_embeds"].clone()  # GIT adds positions to what it is given
            if not self.prefix:
                shown["input_ids"] = None
        elif not self.prefix and shown.get("input_ids") is None:
            mask, first = shown.get("attention_mask"), next(each for each in shown.values() if isinstance(each, Tensor))
            shape = (len(first), 1) if mask is None else mask.shape
            shown["input_ids"] = torch.ones(shape, dtype=torch.long, device=first.device)
        return shown

    def needs_generation(self, inputs: Mapping[str, Any], memory: HighResMemory | None) -> bool:
        """Whether a call can only be made by the generation that it is a part of."""
        return False

    @abstractmethod
    def call(
        self,
        patch: Patch,
        memory: HighResMemory,
        inputs: Mapping[str, Any],
        named: Tensor | None,
        *,
        training: bool,
    ) -> FlexCall:
        """The call of a forward of the model with these inputs."""

    @abstractmethod
    def held(
        self, patch: Patch, memory: HighResMemory, named: Tensor | None, *, training: bool
    ) -> "FlexCall | Reading":
        """What a whole generation carries."""

    def check_config(self, config: FlexConfig) -> None:
        """Raise :class:`~flexkit.errors.ConfigError` for settings that mean nothing to this reader."""
        return

    def check_later(self, inputs: Mapping[str, Any], image: str) -> None:
        """Raise :class:`~flexkit.errors.HighResInputError` for a view that comes with a cache that holds one."""
        return


@dataclass
class Reading:
    """The images of one generation, read before it begins: its forward calls may get no images any more."""

    patch: Patch
    memory: HighResMemory
    named: Tensor | None
    reader: "Words"
    training: bool
    prompt: int | None = None
    """Length of the prompt; by default that of the first call."""
    cached: int = 0
    """Positions that the cache held when the generation began."""
    front: int | None = None
    """Positions that were put in front of the prompt since, as the first call shows: no token stands for them."""

    def __call__(self, inputs: Mapping[str, Any]) -> FlexCall:
        """The call of one step, with the inputs of the text model."""
        memory = cached_memory(inputs.get("past_key_values")) or self.memory
        return self.reader.call(self.patch, memory, inputs, self.named_in(inputs, memory), training=self.training)

    def named_in(self, inputs: Mapping[str, Any], memory: HighResMemory) -> Tensor | None:
        """The positions that query: the last of the prompt and those behind, however many of them a call has."""
        batch, length = self.reader.shape(inputs, memory)
        past = cached_length(inputs.get("past_key_values"))
        self.prompt = length if self.prompt is None else self.prompt
        if self.front is None:
            by_ids = inputs.get(self.reader.prefix + "input_ids") is not None
            self.front = int(past) - self.cached + (0 if by_ids else max(0, length - self.prompt))
        if self.named is not None:
            return pad(self.named, (self.front, 0))
        if not asks_last(self.patch.config):
            return None
        last = self.front + self.prompt - 1
        return (torch.arange(last + 1, device=memory.device)[: past + length] == last).expand(batch, -1)


class Words(Reader):
    """The words of a text: of a decoder-only model, or of the decoder of an encoder-decoder.

    Parameters
    ----------
    prefix : str
        What the names of the text's inputs begin with.
    seen : str, optional
        The input ``(batch, length, ...)`` that says which images a word sees: a word that sees none does not read.
    image_in_front : bool
        Whether the image stands in front of the text in one sequence with it.
    """

    def __init__(self, prefix: str = "", *, seen: str = "", image_in_front: bool = False) -> None:
        self.prefix = prefix
        self._seen = seen
        self._image_in_front = image_in_front

    def shown(self, inputs: Mapping[str, Any], images: int) -> dict[str, Any]:
        shown = super().shown(inputs, images)
        if self.prefix:  # what the decoder has said does not matter to what it reads
            shown = {name: value for name, value in shown.items() if not name.startswith(self.prefix)}
            tensors = {name: value for name, value in shown.items() if isinstance(value, Tensor)}
            texts = [len(tensors[name]) for name in ("input_ids", "inputs_embeds") if name in tensors]
            one = torch.ones(1, 1, dtype=torch.long, device=next(iter(tensors.values())).device)
            shown[self.prefix + "input_ids"] = one.expand((*texts, images)[0], -1)
        return shown

    def needs_generation(self, inputs: Mapping[str, Any], memory: HighResMemory | None) -> bool:
        # One word behind a prompt reads from what the cache carries; and what a generation carries cannot be compiled.
        return memory is None or not torch.compiler.is_compiling() or self.shape(inputs, memory)[1] > 1

    def shape(self, inputs: Mapping[str, Any], memory: HighResMemory) -> tuple[int, int]:
        """Batch and length of the text of a call."""
        tokens = (inputs.get(self.prefix + name) for name in ("input_ids", "inputs_embeds"))
        given = next((each for each in (*tokens, inputs.get("labels")) if each is not None), None)
        batch, length = given.shape[:2] if given is not None else (memory.batch, 1)
        return batch, length

    def call(
        self,
        patch: Patch,
        memory: HighResMemory,
        inputs: Mapping[str, Any],
        named: Tensor | None,
        *,
        training: bool,
    ) -> FlexCall:
        batch, length = self.shape(inputs, memory)
        if batch % memory.batch:
            raise HighResInputError(
                f"high-res tokens of {memory.batch} rows were read, the inputs have {batch}; change the batch of a "
                "cache with its own methods (batch_repeat_interleave, batch_select_indices)."
            )
        memory = memory.repeat_interleave(batch // memory.batch)
        past = cached_length(inputs.get("past_key_values"))
        prefix = _taken_up(memory) if self._image_in_front else 0
        front = prefix if prefix and not past else 0
        mask, labels = inputs.get(self.prefix + "attention_mask"), inputs.get("labels")
        attended = mask if isinstance(mask, Tensor) and mask.ndim == 2 else memory.items.new_ones(batch, length)
        attended = attended[:, -length:].bool().to(memory.device)
        seen = inputs.get(self._seen)
        if seen is not None:
            attended = attended & (seen[:, -length:].flatten(2) > 0).any(-1)
        if self.prefix and labels is not None:  # a decoder's labels are its inputs shifted already
            named, labels = labels != IGNORED, None
        text = {
            "attention_mask": pad(attended, (front, 0)),
            "labels": labels if labels is None else pad(labels, (front, 0), value=IGNORED),
            "logits_to_keep": inputs.get("logits_to_keep", 0),
        }
        if named is not None:
            named = pad(named, (prefix, 0))
        rows = query_rows(
            patch.config,
            text,
            memory,
            named,
            past=past,
            length=front + length,
            repeats=batch // max(1, len(named)) if named is not None else 1,
        )
        return FlexCall(patch, memory, rows, past, patch.projection(inputs.get("past_key_values")), training)

    def check_later(self, inputs: Mapping[str, Any], image: str) -> None:
        if not self.prefix and inputs.get(image) is not None:
            raise HighResInputError(
                "this KV cache holds a high-res view already, and takes no other; pass all images in the first call, "
                "and hd_* with that call only."
            )

    def held(self, patch: Patch, memory: HighResMemory, named: Tensor | None, *, training: bool) -> Reading:
        return Reading(patch, memory, named, self, training)


class LearnedQueries(Reader):
    """Queries that are weights of the model: all of them read, each by its own map, and words read what they say.

    Parameters
    ----------
    behind_image : bool
        Whether they stand behind the image in one sequence with it.
    """

    def __init__(self, *, behind_image: bool = False) -> None:
        self._behind_image = behind_image

    def call(
        self,
        patch: Patch,
        memory: HighResMemory,
        inputs: Mapping[str, Any],
        named: Tensor | None,
        *,
        training: bool,
    ) -> FlexCall:
        if named is not None:
            raise HighResInputError("hd_queries names words, and in this model learned queries read; leave it out.")
        unknown = RaggedIndex(torch.zeros(memory.batch, 0, dtype=torch.bool, device=memory.device))
        first = _taken_up(memory) if self._behind_image else 0
        return _OfLearnedQueries(patch, memory, unknown, 0, patch.projection(None), training, first=first)

    def held(self, patch: Patch, memory: HighResMemory, named: Tensor | None, *, training: bool) -> FlexCall:
        return self.call(patch, memory, {}, named, training=training)

    def check_config(self, config: FlexConfig) -> None:
        for name, neutral in (("gate", None), ("share_selection", None)):
            if getattr(config, name) is not neutral:
                raise ConfigError(f"learned queries read the image in this model, not words; set {name}=None.")


@dataclass
class _OfLearnedQueries(FlexCall):
    """A call whose rows are known when the first attention has them."""

    first: int = 0
    """The first position that reads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shares_selection = False

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, base: Tensor, **options: Any
    ) -> Tensor:
        if options.get("is_causal") and mask is None:  # KOSMOS-2 in early versions of transformers
            raise UnsupportedModelError(
                "the kernel hides from every learned query all but the first patches of the image; load the model with "
                "attn_implementation='eager'."
            )
        if not self.rows.mask.shape[1]:  # a generation may repeat every image for its beams
            self.memory = self.memory.repeat_interleave(len(query) // self.memory.batch)
            self.levels = self.memory.levels
            reading = torch.arange(query.shape[2], device=query.device) >= self.first
            self.rows = RaggedIndex(self.memory.rows_with_images[:, None] & reading)
        return super().attend(layer, query, key, value, mask, base, **options)

    def finish(self, cache: object) -> None:
        super().finish(None)  # the next calls of a generation do not look at the image


def _taken_up(memory: HighResMemory) -> int:
    """Positions that the images take up in front of what reads them."""
    return int(max(span.columns.max() for span in memory.images)) + 1
