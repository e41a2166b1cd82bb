"""A Hugging Face processor that prepares both views."""

import copy
import weakref
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL.Image import Image
from torch import nn
from transformers import BatchFeature

from flexkit.encoding import ArraySource, FrameSource, PictureSource, TileSource
from flexkit.errors import ConfigError, PatchError, UnsupportedModelError
from flexkit.grids import Grid, Pair, pyramid, zoom_along
from flexkit.patching import get_patch
from flexkit.processing import pretrained
from flexkit.processing.overviews import check_options, without_tiles
from flexkit.processing.source_overviews import with_overviews
from flexkit.processing.tap import tap
from flexkit.processing.views import choose_view, has_one_size
from flexkit.processing.views.source import SourceView, check_arithmetic
from flexkit.processing.views.videos import frames_have_one_size, shown_frames

__all__ = ["FlexProcessor"]

_PIXELS = ("pixel_values", "image_patches", "flattened_patches")


class FlexProcessor:
    r"""Wrap the processor of a vision-language model so that it prepares both views of every image and video.

    The low-res inputs are exactly those of the wrapped processor. Beside them stand the inputs of the
    high-res view: the arguments of the model's own ``get_image_features``, prefixed with ``hd_``. Everything
    else (attributes, ``batch_decode``, ...) is the wrapped processor's.

    ==============  ============================  ====================================================
    vision towers   input                         shape
    ==============  ============================  ====================================================
    of one size     ``hd_pixel_values``           (images, channels, zoom_rows · h, zoom_columns · w)
    \               ``hd_image_sizes``            (images, 2): height and width of the originals, given
                                                  only where the image processor pads to squares
    of any size     ``hd_pixel_values``           as the model takes its images: flattened patches, or
                                                  pictures padded to the largest
    \               ``hd_image_grid_thw``,        (images, ...): rows and columns are exactly ``zoom``
                    ``hd_image_sizes``,           times those of the low-res view; the name is the
                    ``hd_spatial_shapes``, ...    model's own
    of numbered     ``hd_flattened_patches``      (images, patches, 2 + width), padded to the most: row,
    patches                                       column and pixels; ``zoom`` times the rows and columns
    ==============  ============================  ====================================================

    An image may be a :class:`flexkit.TileSource`, of which nothing but an overview and the tiles that are looked at is
    ever decoded; and the model may read several ``levels`` of zoom. Then ``hd_tiles`` takes the place of
    ``hd_pixel_values``, for vision towers of one size: a list of :class:`flexkit.TileView`, one for each image.

    The dtype of ``hd_pixel_values`` is that of ``pixel_values``; sizes are integers.

    Processors that cut large images into tiles of their own (InternVL, Mllama, LLaVA-NeXT, ...) are asked for
    the overview alone, because the high-res view takes the place of the tiles: ``crop_to_patches=False``,
    ``do_image_splitting=False`` and the like are set for every call, and the prompt holds the image tokens of one
    overview for each image.

    Frames of a video are chosen by the model's video processor; ``hd_pixel_values_videos`` and what comes with it show
    the same ones ``zoom`` times as large, and with a zoom in time those between them. VideoLLaMA 3 is asked to keep all
    tokens, ``use_token_compression=False``.

    An image that is smaller than its high-res view is enlarged, which a :class:`flexkit.SmallImageWarning` says.

    Parameters
    ----------
    processor : transformers.ProcessorMixin
        The model's processor.
    model : torch.nn.Module or int or tuple of int
        The patched model, which is asked for its zoom at every call and not kept alive; or the zoom itself,
        where there is no model, as in the workers of a data loader: along rows and columns, or along frames of videos,
        rows and columns.
    levels : int
        Of zoom, where the zoom itself is given; a model knows its own.

    Raises
    ------
    PatchError
        If the model is not patched.
    UnsupportedModelError
        If the processor has no image processor, or one of a kind of which flexkit cannot make a second view.
    ConfigError
        If a zoom is given that is not one, two or three positive ints, or the processor is a FlexProcessor itself.

    Examples
    --------
    .. code-block:: python

        processor = flexkit.FlexProcessor(AutoProcessor.from_pretrained(name), model)
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        processor.batch_decode(model.generate(**inputs, max_new_tokens=20))
    """

    __slots__ = ("__weakref__", "_levels", "_zoom_source", "processor")

    processor: Any
    _zoom_source: weakref.ref[nn.Module] | Grid
    _levels: int

    def __init__(self, processor: Any, model: nn.Module | int | Grid, levels: int = 1) -> None:
        if isinstance(processor, FlexProcessor):
            raise ConfigError(
                "the processor is a FlexProcessor already, which would make a high-res view of a high-res view: give "
                "the one that it wraps, its .processor."
            )
        self.processor = processor
        if getattr(processor, "image_processor", None) is None:
            makes = "it takes videos" if getattr(processor, "video_processor", None) else "it takes no images"
            raise UnsupportedModelError(
                f"{type(processor).__name__} has no image processor, {makes}; give a vision-language one, or prepare "
                "the hd_ inputs yourself."
            )
        choose_view(processor.image_processor)
        self._zoom_source = weakref.ref(model) if isinstance(model, nn.Module) else zoom_along(model, 3)
        self._levels = levels
        _ = self.zooms  # an unpatched model is told now, not at the first image

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """For ``isinstance``, by which pipelines and trainers tell a processor: that of the wrapped one too."""
        return type(self.processor)

    @property
    def zoom(self) -> Pair:
        """Zoom along rows and columns, of the first level.

        Raises
        ------
        PatchError
            If the model has been unpatched or no longer exists.
        """
        return self.zooms[0]

    @property
    def zooms(self) -> tuple[Pair, ...]:
        """Zoom along rows and columns, of each level.

        Raises
        ------
        PatchError
            As for :attr:`zoom`.
        """
        return self._zooms_of_both()[0]

    @property
    def video_zoom(self) -> Grid:
        """Zoom of videos, along frames, rows and columns.

        Raises
        ------
        PatchError
            As for :attr:`zoom`.
        """
        return self._zooms_of_both()[1]

    def _zooms_of_both(self) -> tuple[tuple[Pair, ...], Grid]:
        """Zooms of pictures, of each level, and that of videos."""
        if isinstance(self._zoom_source, tuple):
            _, rows, columns = self._zoom_source
            return pyramid((rows, columns), self._levels), self._zoom_source
        model = self._zoom_source()
        if model is None:
            raise PatchError("the model no longer exists: make a FlexProcessor for the new one.")
        try:
            config = get_patch(model).config
        except PatchError as error:
            raise PatchError(
                f"{type(model).__name__} is not patched: patch it again, or use the plain processor."
            ) from error
        return config.zooms, config.video_zoom

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Prepare text and images as the wrapped processor does, and the high-res view of the images.

        Parameters
        ----------
        *args, **kwargs
            Those of the wrapped processor: ``images``, which may be :class:`flexkit.TileSource`, ``videos``, ``text``,
            ``return_tensors``, ``padding``, ...

        Returns
        -------
        transformers.BatchFeature
            The wrapped processor's output; the ``hd_`` inputs are added if there are images.

        Raises
        ------
        HighResInputError
            If an image cannot be read, or the processor is told to cut images into several.
        PatchError
            If the model is no longer patched.
        """
        return self._call("__call__", args, kwargs)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Format a conversation as the wrapped processor does.

        Parameters
        ----------
        *args, **kwargs
            Those of the wrapped processor.

        Returns
        -------
        str or list or transformers.BatchFeature
            With ``tokenize=True, return_dict=True`` both views of the images in the conversation; otherwise
            what the wrapped processor returns.

        Raises
        ------
        HighResInputError, PatchError
            As for a call.
        """
        return self._call("apply_chat_template", args, kwargs)

    @overload
    def shown(self, image: Image | TileSource, **options: Any) -> Image: ...

    @overload
    def shown(self, image: FrameSource, **options: Any) -> list[Image]: ...

    def shown(self, image: Image | TileSource | FrameSource, **options: Any) -> Image | list[Image]:
        """What the views show of an image or video: without what is cropped off, and with what is padded.

        Selections are laid over this, see :func:`flexkit.plot_selection`.

        Parameters
        ----------
        image : PIL.Image.Image or TileSource or FrameSource
            As it was given to the processor.
        **options
            Keyword arguments of the image processor, or of the video processor, if the call had any.

        Returns
        -------
        PIL.Image.Image or list of PIL.Image.Image
            In RGB, in the pixels of the image; all of it for vision towers that take any size. Of a video, one for each
            frame of the low-res grid.

        Raises
        ------
        UnsupportedModelError
            If the processor has no video processor, and is given a video.
        """
        if isinstance(image, FrameSource):
            return self._shown_frames(image, options)
        image_processor = self.processor.image_processor
        source = image if isinstance(image, TileSource) else PictureSource(image)
        if not has_one_size(image_processor):
            return source.overview(max(source.size)).convert("RGB")
        options = {**options, **without_tiles(image_processor, options)}
        check_arithmetic(image_processor, options, ("pixel_values",))
        return SourceView(source, image_processor, options, self.zooms).whole()

    def _shown_frames(self, source: FrameSource, options: dict[str, Any]) -> list[Image]:
        video_processor = getattr(self.processor, "video_processor", None)
        if video_processor is None:
            raise UnsupportedModelError(
                f"{type(self.processor).__name__} has no video processor; those of transformers need torchvision."
            )
        frames = map(ArraySource, shown_frames(video_processor, source, options))
        if not frames_have_one_size(video_processor):
            return [frame.overview(max(frame.size)) for frame in frames]
        return [SourceView(frame, video_processor, options, (self.zoom,)).whole() for frame in frames]

    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], **kwargs: Any) -> "FlexProcessor":
        """Load what :meth:`save_pretrained` or :meth:`push_to_hub` saved, with the zoom that it had.

        Parameters
        ----------
        name : str or os.PathLike
            A folder, or a repository on the Hugging Face hub.
        **kwargs
            Of ``AutoProcessor.from_pretrained``.

        Raises
        ------
        CheckpointError
            If no FlexProcessor was saved there.
        """
        return cls(*pretrained.load(name, **kwargs))

    def save_pretrained(self, folder: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save the wrapped processor, and what makes transformers load a FlexProcessor.

        ``AutoProcessor.from_pretrained`` gives a FlexProcessor with ``trust_remote_code=True``, otherwise the wrapped
        processor.

        Parameters
        ----------
        folder : str or os.PathLike
            Best that of the model.
        push_to_hub : bool
            Whether to upload it, too.
        **kwargs
            Of the wrapped processor's ``save_pretrained``.

        Returns
        -------
        list of str
            Files that the wrapped processor wrote.
        """
        options = {} if push_to_hub else kwargs
        files = pretrained.save(self.processor, self._saved_zoom, len(self.zooms), folder, **options)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(folder).name), **kwargs)
        return files

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload what :meth:`save_pretrained` writes.

        Parameters
        ----------
        repo_id : str
            The repository on the Hugging Face hub.
        **kwargs
            Of the wrapped processor's ``push_to_hub``.
        """
        twin = copy.copy(self.processor)
        vars(twin)["save_pretrained"] = lambda folder, **_: self.save_pretrained(folder)
        return twin.push_to_hub(repo_id, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: :meth:`save_pretrained` writes what ``AutoProcessor`` needs."""

    def _call(self, method: str, args: Any, kwargs: Any) -> Any:
        check_options(kwargs, self.processor.image_processor)
        tapped, high_res = tap(self.processor, self.zooms, self.video_zoom)
        return _with_high_res(getattr(tapped, method)(*with_overviews(args), **with_overviews(kwargs)), high_res)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FlexProcessor.__slots__:
            object.__setattr__(self, name, value)
        else:
            setattr(self.processor, name, value)

    def __reduce__(self) -> tuple[type["FlexProcessor"], tuple[Any, Grid, int]]:
        return FlexProcessor, (self.processor, self._saved_zoom, len(self.zooms))

    @property
    def _saved_zoom(self) -> Grid:
        return self.zoom if self.video_zoom[0] == 1 else self.video_zoom

    def __repr__(self) -> str:
        try:
            zoom = str(self.zoom)
        except PatchError:
            zoom = "unknown"
        return f"FlexProcessor({type(self.processor).__name__}, zoom={zoom})"


def _with_high_res(outputs: Any, high_res: dict[str, Any]) -> Any:
    if high_res and isinstance(outputs, Mapping):
        low_res = next(value for name, value in outputs.items() if name.startswith(_PIXELS))
        kind = "pt" if torch.is_tensor(low_res) else "np" if isinstance(low_res, np.ndarray) else None
        tensors = {name: value for name, value in high_res.items() if name != "hd_tiles"}
        added = {**high_res, **BatchFeature(tensors, tensor_type=kind)}
        outputs.update(added)  # type: ignore[attr-defined]
    return outputs
