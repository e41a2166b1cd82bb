"""Ask a small patched model about a picture, and keep all that led to the answer."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from PIL.Image import Image
from torch import Tensor, nn

import flexkit
from flexkit.demo.model import small_llava
from flexkit.demo.ways import with_flexkit
from flexkit.patching import get_patch

__all__ = ["SHARE", "Answer", "ask"]

SHARE = 0.1
"""Share of the picture that a layer reads in high resolution."""


@dataclass(frozen=True)
class Answer:
    """An answer and how it came about.

    Attributes
    ----------
    text : str
        The answer.
    model : torch.nn.Module
        The patched model that gave it.
    processor : FlexProcessor
        That of the model.
    inputs : dict
        What the processor made of picture and question.
    trace : Trace
        Where the model looked.
    """

    text: str
    model: nn.Module
    processor: flexkit.FlexProcessor
    inputs: Mapping[str, Tensor]
    trace: flexkit.Trace

    @property
    def layers(self) -> dict[int, int]:
        """The layers that read high-res tokens, each with the layer that chose for it."""
        patch = get_patch(self.model)
        return {layer: patch.source(layer) for layer in patch.layers if layer >= patch.start_layer}

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt, image tokens included."""
        return self.inputs["input_ids"].shape[1]

    @property
    def low_res_tokens(self) -> int:
        """Number of image tokens in the prompt."""
        return self.trace.scores(0, self.trace.layers[0])[0].numel()

    @property
    def high_res_tokens(self) -> int:
        """Number of tokens of the high-res view."""
        return self.trace.mask(0, self.trace.layers[0])[0].numel()

    @property
    def read_tokens(self) -> int:
        """How many of these a layer reads at a time."""
        return int(self.trace.mask(0, self.trace.layers[0]).sum())


def ask(picture: Image, question: str, new_tokens: int = 8, seed: int = 0) -> Answer:
    """Build the model, patch it as the paper does, but for a fixed share of the picture, and ask.

    The paper's threshold would keep much of the flat maps of an untrained model.

    Parameters
    ----------
    picture : PIL.Image.Image
        RGB.
    question : str
        About the picture.
    new_tokens : int
        Length of the answer.
    seed : int
        Of the weights.

    Returns
    -------
    Answer
        Of untrained weights.
    """
    model, plain_processor = small_llava(seed)
    with warnings.catch_warnings(action="ignore", category=flexkit.UntrainedProjectionsWarning):
        flexkit.patch_model(model, flexkit.FlexConfig(policy=flexkit.TopK(SHARE)))
    processor = flexkit.FlexProcessor(plain_processor, model)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    with flexkit.trace(model) as trace:
        tokens = with_flexkit(model, inputs, new_tokens).sequences[0, inputs["input_ids"].shape[1] :]
    return Answer(processor.decode(tokens, skip_special_tokens=True), model, processor, inputs, trace)
