"""What the zoo says of a kind of model: how a tiny one is built, and how images enter its prompts."""

import copy
import inspect
import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from torch.nn.functional import pad
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as HEADS

from tests.zoo.exact import compute_exactly

VOCABULARY, PAD = 96, 0
IMAGE, VIDEO, START, END = 90, 91, 92, 93
"""Ids of the special tokens: a placeholder for one image or video token, and what stands around an image."""

Grid = tuple[int, ...]
"""Rows and columns of a picture; frames, rows and columns of a video."""
Views = Callable[[Any, Grid, Grid], dict[str, Tensor]]
"""Config, low-res grid and zoom of one image, to the inputs that show it; images are joined along the first axis."""


Finish = Callable[[Any, dict[str, Tensor], Sequence[int]], dict[str, Tensor]]
"""Config, words and images of the base model, and number of images of each batch row, to what the model takes."""


LEARNED_POSITIONS = "its positions are learned, and count the padding in front"


def nothing(grid: Grid) -> list[int]:
    """No token: the model itself puts an image in its place."""
    return []


def bare(grid: Grid) -> list[int]:
    """One token for each cell, between the marks of an image."""
    return [START, *[IMAGE] * (grid[0] * grid[1]), END]


def in_one(grid: Grid) -> list[int]:
    """One token for each cell of all frames, between the marks of a video."""
    return [START, *[VIDEO] * math.prod(grid), END]


def frame_by_frame(grid: Grid) -> list[int]:
    """The time of every frame in front of it, which is marked as an image is."""
    frames, *cells = grid
    return [token for frame in range(frames) for token in (3 + frame, START, *[VIDEO] * math.prod(cells), END)]


def joined(parts: Sequence[dict[str, Tensor]], strips: Sequence[str] = ()) -> dict[str, Tensor]:
    """Tensors of several views along the first axis; later axes are padded at their end, as processors do it.

    ``strips`` are joined along the last axis.
    """
    names = dict.fromkeys(name for part in parts for name in part)  # videos have others than pictures
    tensors = {name: [part[name] for part in parts if name in part] for name in names}
    return {
        name: torch.cat(values, -1) if name in strips else _stacked(values, -1 if "position" in name else 0)
        for name, values in tensors.items()
    }


def _stacked(tensors: Sequence[Tensor], filler: int) -> Tensor:
    longest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    missing = [[(0, size - own) for own, size in zip(tensor.shape[1:], longest, strict=True)] for tensor in tensors]
    pads = [sum(reversed(pairs), ()) for pairs in missing]
    return torch.cat([pad(tensor, sides, value=filler) for tensor, sides in zip(tensors, pads, strict=True)])


def cast(model: tf.PreTrainedModel, dtype: torch.dtype) -> None:
    """Let a model compute in ``dtype``, but for what transformers keeps in float32 then."""
    exact = {*(model._keep_in_fp32_modules_strict or ())}
    if dtype == torch.float16:
        exact |= {*(model._keep_in_fp32_modules or ())}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            is_exact = isinstance(tensor, torch.nn.Parameter) and any(part in name for part in exact)
            tensor.data = tensor.data.to(torch.float32 if is_exact else dtype)
    for part in (model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)):
        if part is not None:
            part.dtype = dtype  # some towers look there for the dtype of pictures


def copied(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """A deep copy, in half the time: most of what modules hold is dicts of hooks without an entry."""
    held = (value for module in model.modules() for value in vars(module).values())
    return copy.deepcopy(model, {id(value): type(value)() for value in held if isinstance(value, dict) and not value})


@dataclass(frozen=True)
class Family:
    """One kind of model.

    ``name`` is its model type, or that and what is special, behind a hyphen.
    """

    name: str
    config: Callable[[], tf.PreTrainedConfig]
    high_res: Views
    """The high-res view, without the prefix of its names."""
    low_res: Views | None = None
    """What the base model gets; by default the high-res view at zoom 1."""
    grid: Grid = (3, 3)
    """Low-res cells of an image, unless a prompt says otherwise."""
    any_grid: bool = False
    """Whether a prompt may say otherwise."""
    tokens: Callable[[Grid], list[int]] = bare
    """The ids that stand for one image in a prompt."""
    strips: tuple[str, ...] = ()
    """Inputs whose images are joined along the last axis."""
    finish: Finish | None = None
    """Makes the inputs of the base model of words and images, if these are not just those."""
    one_image: bool = False
    """Whether every row of a batch shows exactly one image."""
    stream: str = ""
    """What the names of the inputs begin with that hold the text which the model continues."""
    learned_queries: bool = False
    """Whether learned queries read the image, and no word does."""
    needs_image: bool = False
    """Whether the base model takes no prompt without one."""
    right_padding: str = ""
    """Why the base model answers otherwise to prompts that are padded on the left, if it does."""
    prepare: Callable[[tf.PreTrainedModel], None] | None = None
    """What a model needs to run in float64."""
    video: Views | None = None
    """What shows a video, where the kind takes some that flexkit reads: the name of its grid then has three axes."""
    video_tokens: Callable[[Grid], list[int]] = in_one
    """The ids that stand for one video in a prompt."""
    video_grid: Grid = (2, 2, 3)
    """Low-res cells of a video, unless a prompt says otherwise."""

    def model(self, seed: int = 0) -> tf.PreTrainedModel:
        """A model of its own in eval mode, float64: exact enough to compare different orders of summation."""
        model, random_state = _built(self, seed)
        torch.set_rng_state(random_state)
        return copied(model)

    @cached_property
    def settled(self) -> tf.PreTrainedConfig:
        """A config to look into; models are made of their own. It takes as long to make one as to run a layer."""
        return self.config()

    @cached_property
    def model_class(self) -> Any:
        """The class with the head that generates."""
        return getattr(tf, HEADS[self.settled.model_type])

    @cached_property
    def accepted(self) -> Container[str]:
        """Names of what the model takes."""
        return inspect.signature(self.model_class.forward).parameters

    def views(self, config: Any, grids: Sequence[Grid], zoom: Grid | None = None) -> dict[str, Tensor]:
        """Inputs of all images: those of the base model, or with a zoom those of the high-res view."""
        make: Any = self.high_res if zoom or self.low_res is None else self.low_res
        factors = (1, *(zoom or (1, 1)))
        parts = [(make if len(grid) == 2 else self.video)(config, grid, factors[-len(grid) :]) for grid in grids]
        return joined(parts, self.strips)

    def shown(self, grid: Grid) -> list[int]:
        """The ids that stand for an image, or for a video, in a prompt."""
        return self.tokens(grid) if len(grid) == 2 else self.video_tokens(grid)

    def of_videos(self) -> "Family":
        """The same kind, which is shown a video wherever others are shown an image."""
        return replace(self, name=f"{self.name}-video", grid=self.video_grid)


@cache
def _built(family: Family, seed: int) -> tuple[tf.PreTrainedModel, Tensor]:
    """A model, and the state of the random numbers behind it; it takes longer to build one than to copy it."""
    torch.manual_seed(seed)
    model = family.model_class(family.config()).eval()
    cast(model, torch.float64)
    compute_exactly(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the default initialisation hardly attends to anything
                parameter.normal_(0, 0.3)
            elif parameter.numel() == 1 and not parameter.any():  # a gate that is closed before training
                parameter.fill_(0.5)
    if family.prepare:
        family.prepare(model)
    if model.can_generate():
        model.generation_config.pad_token_id = PAD
        model.generation_config.eos_token_id = None
    return model, torch.get_rng_state()
