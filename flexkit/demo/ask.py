"""Ask a model about a picture, and keep all that led to the answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

import flexkit
from flexkit.patching import get_patch
from flexkit.visual_search.data import prompts
from flexkit.visual_search.ways import Way

__all__ = ["Answer", "Asked", "ask"]

_NEW_TOKENS = 2
"""One word, and the end."""


@dataclass(frozen=True)
class Asked:
    """A way of looking with what it is given of a question.

    Attributes
    ----------
    way : Way
        The model, and how it is given pictures.
    inputs : dict
        What the processor made of picture and question.
    """

    way: Way
    inputs: Mapping[str, Tensor]

    @classmethod
    def of(cls, way: Way, picture: Image, question: str) -> "Asked":
        """Prepare a question."""
        return cls(way, prompts(way.processor, [picture], [question], in_sequence=way.in_sequence))

    @property
    def image_tokens(self) -> int:
        """How many tokens of the prompt are the picture's."""
        return int((self.inputs["input_ids"] == self.way.model.config.image_token_id).sum())

    @property
    def text_tokens(self) -> int:
        """How many tokens of the prompt are the question's."""
        return self.inputs["input_ids"].shape[1] - self.image_tokens

    def generate(self) -> Any:
        """Answer in two tokens, even if one would do: costs are compared."""
        return self._generate(min_new_tokens=_NEW_TOKENS)

    def text(self) -> str:
        """The answer in words."""
        tokens = self._generate().sequences[0, self.inputs["input_ids"].shape[1] :]
        return str(self.way.processor.decode(tokens, skip_special_tokens=True)).strip()

    def _generate(self, **options: int) -> Any:
        return self.way.model.generate(
            **self.inputs, **options, max_new_tokens=_NEW_TOKENS, do_sample=False, return_dict_in_generate=True
        )


@dataclass(frozen=True)
class Answer:
    """An answer of a patched model and how it came about.

    Attributes
    ----------
    text : str
        The answer.
    asked : Asked
        What was asked of which model.
    trace : Trace
        Where the model looked.
    """

    text: str
    asked: Asked
    trace: flexkit.Trace

    @property
    def layers(self) -> dict[int, int]:
        """The layers that read high-res tokens, each with the layer that chose for it."""
        patch = get_patch(self.asked.way.model)
        return {layer: patch.source(layer) for layer in patch.reading}

    @property
    def high_res_tokens(self) -> int:
        """Number of tokens of the high-res view."""
        return self.trace.mask(0, self.trace.layers[0])[0].numel()

    @property
    def read_tokens(self) -> dict[int, int]:
        """How many of these each layer reads for the first word of the answer."""
        return {layer: int(self.trace.mask(0, source).sum()) for layer, source in self.layers.items()}

    @property
    def tiles(self) -> tuple[int, int]:
        """How many tiles were encoded, and of how many."""
        rows, columns = get_patch(self.asked.way.model).config.zoom_pair
        return self.trace.steps[-1].tiles or 0, rows * columns


@torch.no_grad()
def ask(asked: Asked) -> Answer:
    """Answer, and record where the model looks.

    Parameters
    ----------
    asked : Asked
        Of a patched model and one picture.
    """
    with flexkit.trace(asked.way.model) as trace:
        text = asked.text()
    return Answer(text, asked, trace)
