"""How a tiny processor of a model type is built, so that it fits the tiny model of that type in the zoo."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import transformers as tf
from transformers import ProcessorMixin
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as IMAGE_PROCESSORS
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES as PROCESSORS
from transformers.utils import is_torchvision_available

from tests.tiny_processors import tiny_tokenizer
from tests.zoo import END, IMAGE, START, VIDEO, VOCABULARY, ZOO, Family

TORCHVISION = is_torchvision_available()
BREAK, AUDIO, PLACEHOLDER = 94, 95, 89
TOKENS = {
    IMAGE: "<image>",
    VIDEO: "<video>",
    START: "<image_start>",
    END: "<image_end>",
    BREAK: "<break>",
    AUDIO: "<a>",
}
_ATTRIBUTES = {
    IMAGE: "image context_image",
    VIDEO: "video",
    START: "image_start start_image vision_start vision_bos boi image_wrapper image_boundary",
    END: "image_end end_image vision_end vision_eos eoi eof",
    BREAK: "img_line_break image_break slice_start image_id_start video_start",
    AUDIO: "audio audio_bos audio_eos boa eoa slice_end image_id_end video_end",
}
"""What processors call their tokens."""


class Absent:
    """Stands for a part that has nothing to do with images."""

    model_input_names: tuple[str, ...] = ()
    merge_size = 2
    slice_mode = False
    downsample_mode = "16x"


@dataclass(frozen=True)
class TinyProcessor:
    """One processor; its classes are those of the model type, unless they are named."""

    model_type: str
    """Or that and what is special, as in the zoo."""
    images: dict[str, Any] = field(default_factory=dict)
    """Settings of the image processor."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the processor."""
    tokens: dict[int, str] = field(default_factory=dict)
    """Special tokens that are called otherwise than usual, by their ids."""
    prompt: str = "<image>"
    """What stands for an image in a text."""
    processor: str | None = None
    image_processor: str | None = None
    """Without the ending that names the backend."""
    finish: Callable[[Any], None] | None = None
    """What is set on the processor when it is built."""
    call: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a call."""
    mocks: dict[str, Any] = field(default_factory=dict)
    """What stands somewhere in transformers while the processor is built, by its place."""

    backends: tuple[str, ...] = ("pil", "torchvision")
    """Those that it runs with, were everything installed."""
    overview: dict[str, Any] = field(default_factory=dict)
    """Options that turn tiles off."""
    nested: bool = True
    """Whether images come in a list for each text."""
    given: Callable[[list[str]], dict[str, Any]] = lambda texts: {"text": texts}
    """How texts are given."""
    tokenizer: Callable[[], Any] | None = None
    """One of its own."""
    family: Family | None = None
    """The model that it fits, if that is not the zoo's."""
    refused: str = ""
    """Why there is no second view of what it makes."""

    def model(self) -> tf.PreTrainedModel:
        """A tiny model that takes what it makes."""
        return (self.family or ZOO[self.model_type]).model()

    def class_names(self, backend: str) -> tuple[str, str]:
        """Names of the classes of the image processor and the processor; empty if transformers knows none."""
        processor = self.processor or PROCESSORS.get(self.model_type, "")
        if self.image_processor:
            return self.image_processor + ("Pil" if backend == "pil" else ""), processor
        return IMAGE_PROCESSORS.get(self.model_type, {}).get(backend, ""), processor

    def has_classes(self, backend: str) -> bool:
        """Whether both can be had with what is installed."""
        if backend == "torchvision" and not TORCHVISION:
            return False
        try:
            classes = [getattr(tf, name) for name in self.class_names(backend)]
        except (AttributeError, ImportError):
            return False
        return not any(getattr(kind, "_backends", ()) for kind in classes)

    def runs_here(self) -> tuple[str, ...]:
        """The backends that it runs with, as things are."""
        return tuple(backend for backend in self.backends if self.has_classes(backend))

    def build(self, backend: str) -> Any:
        """The processor, with a tokenizer of words ``w4`` to ``w79``."""
        image_processor, processor = (getattr(tf, name, None) for name in self.class_names(backend))
        assert processor
        names = TOKENS | self.tokens
        special = {f"{name}_token": (names[index], index) for index in TOKENS for name in _ATTRIBUTES[index].split()}
        special |= {f"token_{index}": (token, index) for index, token in names.items() if index not in TOKENS}
        tokenizer = self.tokenizer() if self.tokenizer else tiny_tokenizer(special, VOCABULARY)
        tokenizer.padding_side = "left"
        parts = {name: tokenizer if "tokenizer" in name else Absent() for name in processor.get_attributes()}
        if image_processor:
            parts["image_processor"] = image_processor(**self.images)
        with ExitStack() as mocks:
            mocks.enter_context(mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"))
            for place, value in self.mocks.items():
                mocks.enter_context(mock.patch(place, value, create=True))
            built = processor(**parts, **self.settings)
        if self.finish:
            self.finish(built)
        return built
