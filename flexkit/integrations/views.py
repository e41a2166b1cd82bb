"""What a model is shown of pictures: the low-res view, a high-res view beside it, or all of it in the sequence."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image, new
from torch import Tensor, nn

import flexkit
from flexkit.errors import ConfigError, UnsupportedModelError
from flexkit.grids import Pair
from flexkit.probing import without_high_res
from flexkit.processing.views import has_one_size

__all__ = ["VIEWS", "Viewer", "limit_pixels"]

VIEWS = ("low", "flexkit", "all")
"""``low``: what stands in the sequence of a patched model, overviews alone. ``flexkit``: a high-res view beside it.
``all``: as much as the high-res view shows, in the sequence."""

Conversation = Sequence[dict[str, Any]]

_LARGE = 2048, 1024
"""Larger than a tile of any processor."""
_NO_TEXT = {"type": "text", "text": "?"}


class Viewer:
    """Turns conversations about pictures into inputs of a model.

    With all in the sequence a picture becomes what the model itself makes of large ones. Where it takes pictures of any
    size, that is the picture with its bound as much higher as the high-res view is zoomed in; where its processor cuts
    large ones into tiles of its own, those tiles; else the picture, followed by its ``zoom`` times ``zoom`` tiles as
    pictures of their own.

    Parameters
    ----------
    processor : transformers.ProcessorMixin
        Of the base model.
    view : {"low", "flexkit", "all"}
        What is shown.
    model : torch.nn.Module or int or tuple of int, optional
        The patched model, or the zoom of the high-res view where there is none, as for
        :class:`flexkit.FlexProcessor`; the low-res view alone does without.

    Raises
    ------
    ConfigError
        If there is no such view, or it needs a zoom and there is none.
    UnsupportedModelError
        If the processor does not make such a view.
    """

    def __init__(self, processor: Any, view: str, model: nn.Module | int | Pair | None = None) -> None:
        if view not in VIEWS:
            raise ConfigError(f"view is one of {', '.join(VIEWS)}, got {view!r}.")
        self._low_res_only = view == "low"
        self._tiler: flexkit.FlexProcessor | None = None
        self._processor: Any = processor
        if view == "all" and self._is_cut():
            return
        if model is None and view != "low":
            raise ConfigError(
                f"view {view!r} of a model that is not patched has no zoom: patch it, which a preset does, or "
                f"{'give a zoom' if view == 'all' else 'look at the view low'}."
            )
        both = flexkit.FlexProcessor(processor, 1 if model is None or self._low_res_only else model)
        if view != "all":
            self._processor = both
        elif has_one_size(processor.image_processor):
            self._tiler = both
        else:
            self._processor = copy.copy(processor)
            self._processor.image_processor = _with_larger(processor.image_processor, both.zoom)

    def _is_cut(self) -> bool:
        """Whether the processor makes more than an overview of a large picture, by settings that each family has."""
        asked = [[{"role": "user", "content": [{"type": "image", "image": new("RGB", _LARGE)}, _NO_TEXT]}]]
        whole, overview = self(asked), Viewer(self._processor, "low")(asked)
        pixels = [name for name in whole if name.startswith("pixel_values")]
        return not all(name in overview and torch.equal(_flat(whole[name]), _flat(overview[name])) for name in pixels)

    def __call__(self, conversations: Sequence[Conversation]) -> Any:
        """Prepare a batch.

        Parameters
        ----------
        conversations : sequence
            Of messages, as chat templates take them; the content of a picture is ``{"type": "image", "image": ...}``.

        Returns
        -------
        transformers.BatchFeature
            Padded as the tokenizer does.
        """
        shown = [[self._shown(message) for message in conversation] for conversation in conversations]
        if getattr(self._processor, "chat_template", None) is None:
            inputs = self._plain(shown)
        else:
            inputs = self._processor.apply_chat_template(
                shown,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        if self._low_res_only:
            inputs.data = without_high_res(inputs)
        return inputs

    def _shown(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._tiler is None or isinstance(message["content"], str):
            return message
        parts = [
            {"type": "image", "image": image} if image is not None else part
            for part in message["content"]
            for image in (self._tiles(part["image"]) if part["type"] == "image" else [None])
        ]
        return message | {"content": parts}

    def _tiles(self, picture: Image) -> list[Image]:
        """A picture and its tiles, in raster order."""
        assert self._tiler is not None
        whole, (rows, columns) = self._tiler.shown(picture), self._tiler.zoom
        lefts, tops = (
            [round(side * index / parts) for index in range(parts + 1)]
            for side, parts in zip(whole.size, (columns, rows), strict=True)
        )
        boxes = [
            (lefts[column], tops[row], lefts[column + 1], tops[row + 1])
            for row in range(rows)
            for column in range(columns)
        ]
        return [picture, *(whole.crop(box) for box in boxes)]

    def _plain(self, conversations: Sequence[Conversation]) -> Any:
        """Of a processor without a chat template: pictures, and then what is said."""
        token = getattr(self._processor, "image_token", None) or "<image>"
        images, texts = [], []
        for conversation in conversations:
            parts = [part for message in conversation for part in message["content"]]
            images.append([part["image"] for part in parts if part["type"] == "image"])
            said = [part["text"] for part in parts if part["type"] == "text"]
            texts.append(" ".join([*[token] * len(images[-1]), *said]))
        return self._processor(images=images, text=texts, padding=True, return_tensors="pt")


def limit_pixels(image_processor: Any, pixels: int) -> None:
    """Bound the low-res view of a model that takes pictures of any size.

    Parameters
    ----------
    image_processor : transformers.BaseImageProcessor
        Changed in place.
    pixels : int
        At most so many in a picture.

    Raises
    ------
    UnsupportedModelError
        If its pictures are not bounded by their number of pixels.
    """
    if not _counts_pixels(image_processor):
        raise UnsupportedModelError(
            f"max_pixels bounds pictures of any size, and {type(image_processor).__name__} has sizes of its own: leave "
            "it out."
        )
    image_processor.size = _size(image_processor, {"longest_edge": pixels})


def _flat(pixels: Tensor | list[Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in pixels])


def _with_larger(image_processor: Any, zoom: Pair) -> Any:
    """A copy that lets pictures be larger."""
    twin, bound = copy.copy(image_processor), _bound(image_processor)
    if _counts_pixels(image_processor):
        bound *= zoom[0] * zoom[1]
    elif bound and "image_sizes" in image_processor.model_input_names:
        bound *= max(zoom)
    else:
        raise UnsupportedModelError(
            f"{type(image_processor).__name__} is not known to show larger pictures when told so: compare with a "
            "processor of yours that does."
        )
    twin.size = _size(image_processor, {"longest_edge": bound})
    return twin


def _counts_pixels(image_processor: Any) -> bool:
    """Whether the bounds of a picture are numbers of pixels, as of Qwen-VL and GLM-V."""
    return "image_grid_thw" in image_processor.model_input_names and _bound(image_processor) > 0


def _bound(image_processor: Any) -> int:
    size = getattr(image_processor, "size", None) or {}
    return dict(size).get("longest_edge") or 0


def _size(image_processor: Any, changed: dict[str, int]) -> Any:
    given = image_processor.size
    return type(given)(**{name: value for name, value in dict(given).items() if value} | changed)
