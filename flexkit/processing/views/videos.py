"""Videos: the same frames at a higher resolution, and frames between them."""

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.video_utils import VideoMetadata

from flexkit.encoding import FrameSource, TileView
from flexkit.errors import FlexkitError, HighResInputError, UnsupportedModelError, first_line
from flexkit.grids import Grid, Pair, split_tiles
from flexkit.processing.outputs import like
from flexkit.processing.resizing import tell_enlarged
from flexkit.processing.source_overviews import clips_of, with_overviews

__all__ = ["ClipView", "frames_between", "frames_have_one_size", "in_both_views", "shown_frames"]

_SIZED = ("video_grid_thw", "video_position_ids")
"""Outputs that say how large each video is."""
_KEPT_BYTES = 2**27
"""Of tiles that are kept, so that a frame is decoded once where different layers read in it."""
_PIXELS = "pixel_values_videos"
_KEPT = (_PIXELS, "video_merge_sizes", "num_frames_per_video", *_SIZED)


class ClipView(TileView):
    """The tiles of the frames of one video, made of one frame at a time by the video processor.

    Parameters
    ----------
    source : FrameSource
        The video.
    indices : torch.Tensor
        ``(frames,)``, int64, ascending: the frames of the high-res view.
    video_processor : transformers.BaseVideoProcessor
        One that makes frames of one size.
    settings : mapping
        What its ``_preprocess`` is told to make the high-res view.
    zoom : tuple of int
        Tiles along rows and columns.
    """

    def __init__(
        self, source: FrameSource, indices: Tensor, video_processor: Any, settings: Mapping[str, Any], zoom: Pair
    ) -> None:
        self.source, self.zooms, self.frames = source, (zoom,), len(indices)
        self._indices, self._video_processor, self._settings = indices.tolist(), video_processor, settings
        self._kept: dict[int, Tensor] = {}

    def read(self, level: int, tiles: Sequence[int]) -> tuple[Tensor, ...]:
        count = math.prod(self.zooms[0])
        of_frames = dict[int, list[int]]()
        for tile in tiles:
            of_frames.setdefault(tile // count, []).append(tile)
        there = {frame: cut for frame in of_frames if (cut := self._kept.get(frame)) is not None}
        lacking = sorted(of_frames.keys() - there.keys())
        decoded = self.source.read([self._indices[frame] for frame in lacking])
        made = dict[int, Tensor]()
        for frame, cut in itertools.chain(there.items(), zip(lacking, map(self._cut, decoded), strict=True)):
            self._keep(frame, cut)
            made |= {tile: cut[tile % count] for tile in of_frames[frame]}
        return (torch.stack([made[tile] for tile in tiles]),)

    def _cut(self, pixels: np.ndarray) -> Tensor:
        """The tiles of a frame."""
        shown = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        view = torch.as_tensor(self._video_processor._preprocess([shown], **self._settings)[_PIXELS][0])
        return split_tiles(view, self.zooms[0])[0]

    def _keep(self, frame: int, tiles: Tensor) -> None:
        """Keep the tiles of a frame for who reads others of it, in the place of those that were read first."""
        self._kept.pop(frame, None)
        for other in list(self._kept)[: max(0, len(self._kept) + 1 - _KEPT_BYTES // tiles.nbytes)]:
            self._kept.pop(other, None)  # another thread may have been here
        self._kept[frame] = tiles


def in_both_views(video_processor: Any, zoom: Grid, high_res: dict[str, Any]) -> Any:
    """A copy of a video processor that does the same, and makes the high-res view of what it is given on the way.

    Parameters
    ----------
    video_processor : transformers.BaseVideoProcessor
        The video processor of the low-res view.
    zoom : tuple of int
        Along frames, rows and columns.
    high_res : dict
        Where the high-res inputs are put, prefixed with ``hd_``.
    """

    def preprocess(videos: Any, *args: Any, **options: Any) -> Any:
        low = _LowRes(video_processor, videos)
        made = low.made(*args, **options)
        frames = low.frames(zoom[0])
        if low.sources and frames_have_one_size(video_processor):
            high_res["hd_frames"] = low.clips(frames, zoom)
            return made
        views = low.whole(made, frames, zoom, *args, **options)
        for name in (name for name in _KEPT if name in views):
            value = views[name]
            in_tensors = isinstance(value, Tensor) or (isinstance(value, list) and isinstance(value[0], Tensor))
            high_res[f"hd_{name}"] = like(value if in_tensors else torch.as_tensor(value), made[name])
        return made

    both = copy.copy(video_processor)
    both.preprocess = preprocess
    return both


def frames_have_one_size(video_processor: Any) -> bool:
    """Whether a video processor makes frames of one size, so that each tile of a frame passes as a frame does."""
    return not {*_SIZED} & {*video_processor.model_input_names}


def shown_frames(video_processor: Any, source: FrameSource, options: Mapping[str, Any]) -> list[np.ndarray]:
    """What the low-res view shows, one frame for each of its grid.

    Parameters
    ----------
    video_processor : transformers.BaseVideoProcessor
        The video processor of the low-res view.
    source : FrameSource
        The video.
    options : mapping
        The keyword arguments of the low-res call.

    Returns
    -------
    list of numpy.ndarray
        Each ``(height, width, 3)``, uint8: of frames that the processor merges, the first.
    """
    videos = with_overviews([source])
    low = _LowRes(video_processor, videos)
    low.made(**options)
    every = torch.arange(len(source))
    return [*source.read(next(iter(low.chosen), every)[:: low.together].tolist())]


class _LowRes:
    """How the low-res view of videos is made: what a copy of the video processor that does the same was asked to do.

    Parameters
    ----------
    video_processor : transformers.BaseVideoProcessor
        The original.
    videos : object
        As it is given them.
    """

    def __init__(self, video_processor: Any, videos: Any) -> None:
        self.sources, self._videos = clips_of(videos), videos
        self.chosen: list[Tensor] = []
        """Indices of the frames of each video, ``(frames,)``; empty if all were taken."""
        self._original = video_processor
        self._processor = self._twin()
        self._processor.sample_frames, self._processor.resize = self._sample_frames, self._resize
        self._processor._preprocess = self._preprocess
        self._extents: dict[Any, Pair] = {}
        self._settings: dict[str, Any] = {}

    def made(self, *args: Any, **options: Any) -> Any:
        """The low-res view.

        Raises
        ------
        HighResInputError
            If the video processor cannot make it.
        """
        try:
            return self._processor.preprocess(self._videos, *args, **options)
        except (FlexkitError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the code of any family meets in a video
            raise HighResInputError(
                f"{type(self._original).__name__} makes nothing of these videos: {first_line(error).rstrip('.')}. "
                "Expected arrays of uint8, (frames, height, width, 3), or files opened by flexkit.open_video, and "
                "settings that it takes."
            ) from error

    @property
    def together(self) -> int:
        """How many frames are merged."""
        return getattr(self._original, "temporal_patch_size", None) or 1

    def frames(self, factor: int) -> list[Tensor]:
        """Indices of the frames of the high-res view of each video."""
        if factor > 1 and not self.chosen:
            raise HighResInputError(
                f"a zoom of {factor} in time reads frames between those of the low-res view, and this one takes all "
                "that there are: let the video processor choose, with do_sample_frames=True and fps or num_frames."
            )
        return [frames_between(each, factor, self.together) for each in self.chosen]

    def clips(self, frames: Sequence[Tensor], zoom: Grid) -> list[ClipView]:
        """The high-res view of sources whose frames have one size."""
        larger = self._settings | _larger(self._original, self._settings, zoom)
        every = (torch.arange(len(source)) for source in self.sources)
        return [
            ClipView(source, own.clamp(0, len(source) - 1), self._original, larger, (zoom[1], zoom[2]))
            for source, own in zip(self.sources, frames or every, strict=True)
        ]

    def whole(self, made: Mapping[str, Any], frames: Sequence[Tensor], zoom: Grid, *args: Any, **options: Any) -> Any:
        """The high-res view of all videos in the form of the low-res one, which was made."""
        wanted, high = iter(frames), self._twin()

        def sample_more(metadata: Any, **_: Any) -> Any:
            return next(wanted).clamp(0, metadata.total_num_frames - 1).numpy()

        def enlarged(videos: Sequence[Tensor], **settings: Any) -> Any:
            return _enlarged(self._original, videos, settings, made, self._extents, zoom)

        if zoom[0] > 1:
            high.sample_frames = sample_more
        high._preprocess = enlarged
        return high.preprocess(self._videos, *args, **options)

    def _twin(self) -> Any:
        twin = copy.copy(self._original)
        if self.sources:
            twin._decode_and_sample_videos = _decoded
        return twin

    def _sample_frames(self, metadata: Any, **settings: Any) -> Any:
        try:
            indices = self._original.sample_frames(metadata=metadata, **settings)
        except (ValueError, ArithmeticError) as error:
            asked = {name: settings.get(name) for name in ("num_frames", "fps")}
            raise HighResInputError(
                f"{type(self._original).__name__} cannot choose from {metadata.total_num_frames} frames by {asked}: "
                f"{first_line(error).rstrip('.')}. Ask for fewer, or take all of a short video, do_sample_frames=False."
            ) from error
        self.chosen.append(torch.as_tensor(indices))
        return indices

    def _resize(self, videos: Tensor, **settings: Any) -> Any:
        white = self._original.resize(torch.ones_like(videos), **settings).flatten(0, -3).any(0)
        self._extents[videos.shape[-2:]] = int(white.any(1).sum()), int(white.any(0).sum())
        return self._original.resize(videos, **settings)

    def _preprocess(self, videos: Any, **settings: Any) -> Any:
        for video in videos:
            if 0 in video.shape:
                raise HighResInputError(f"a video of shape {tuple(video.shape)} has no frames, or these no pixels.")
        self._settings = _uncompressed(settings)
        return type(self._original)._preprocess(self._processor, videos, **self._settings)


def _decoded(
    videos: Any, video_metadata: Any = None, do_sample_frames: Any = None, sample_indices_fn: Any = None
) -> tuple[list[Tensor], list[VideoMetadata]]:
    """The frames of sources that are chosen, all by default, and what is known of them."""
    clips, facts = [], []
    for source in clips_of(videos):
        height, width = source.size
        known = VideoMetadata(len(source), source.fps, width, height, source.seconds, "flexkit")
        known.frames_indices = list(range(len(source)))
        if sample_indices_fn is not None:
            known.frames_indices = sample_indices_fn(metadata=known)
        frames = [torch.from_numpy(frame) for frame in source.read(torch.as_tensor(known.frames_indices).tolist())]
        clips.append(torch.stack(frames).permute(0, 3, 1, 2))
        facts.append(known)
    return clips, facts


def frames_between(indices: Tensor, factor: int, together: int) -> Tensor:
    """Indices of the frames of a video that is sampled ``factor`` times as often.

    Each frame is the middle one in time of those that take its place; of an even number, of the two in the middle.

    Parameters
    ----------
    indices : torch.Tensor
        ``(frames,)``, ascending: of the frames that were sampled.
    factor : int
        How many take the place of one.
    together : int
        How many frames the processor merges; it repeats the last one until they can be.

    Returns
    -------
    torch.Tensor
        ``(factor * frames,)``, int64, with frames repeated as the processor does; the first and the last may lie
        outside of the video.
    """
    missing = -len(indices) % together
    known = torch.cat([indices, indices[-1:].expand(missing)]).double()
    places = (torch.arange(len(known) * factor) + 0.5) / factor - 0.5
    if len(known) == 1:
        return known.expand(factor).long()
    left = places.floor().clamp(0, len(known) - 2).long()
    return (known[left] + (places - left) * (known[left + 1] - known[left])).round().long()


def _uncompressed(settings: dict[str, Any]) -> dict[str, Any]:
    """Without the compression that leaves out tokens (VideoLLaMA 3)."""
    return settings | ({"use_token_compression": False} if "use_token_compression" in settings else {})


def _enlarged(
    video_processor: Any,
    videos: Sequence[Tensor],
    settings: dict[str, Any],
    low_res: Mapping[str, Any],
    shown: Mapping[Any, tuple[int, int]],
    zoom: Grid,
) -> Any:
    """The high-res view of videos ``(frames, channels, height, width)``."""
    settings, name = _uncompressed(settings), next((name for name in _SIZED if name in low_res), None)
    if name is None:
        return video_processor._preprocess(videos, **settings | _larger(video_processor, settings, zoom))
    expected = [
        (frames * zoom[0], rows * zoom[1], columns * zoom[2]) for frames, rows, columns in _grids(name, low_res)
    ]
    if len(expected) > len(videos):
        raise UnsupportedModelError(
            f"{type(video_processor).__name__} cuts {len(videos)} videos into {len(expected)} parts, and flexkit makes "
            "no high-res view of a part; have fewer frames sampled."
        )
    side = settings["patch_size"]
    enlarged = []
    for video, (_, rows, columns) in zip(videos, expected, strict=True):
        canvas = rows * side, columns * side
        extent = shown.get(video.shape[-2:], (canvas[0] // zoom[1], canvas[1] // zoom[2]))
        size = extent[0] * zoom[1], extent[1] * zoom[2]
        tell_enlarged(video_processor, video.shape, size)
        frames = _resized(video, size, settings.get("resample"))
        enlarged.append(F.pad(frames, (0, canvas[1] - size[1], 0, canvas[0] - size[0])))
    if settings.get("max_soft_tokens"):
        settings["max_soft_tokens"] *= zoom[1] * zoom[2]
    try:
        made = video_processor._preprocess(enlarged, **settings | {"do_resize": False})
    except ValueError as error:
        raise UnsupportedModelError(
            f"{type(video_processor).__name__} makes no view {zoom} times as large as its low-res one: {error}"
        ) from error
    if _grids(name, made) != expected:
        raise UnsupportedModelError(
            f"{type(video_processor).__name__} made a high-res view with grids {_grids(name, made)}, where zoom {zoom} "
            f"asks for {expected}: it resizes what is not to be resized."
        )
    return made


def _grids(name: str, made: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Frames, rows and columns of every video, in patches."""
    sizes = torch.as_tensor(made[name])
    if name == "video_grid_thw":
        return [(frames, rows, columns) for frames, rows, columns in sizes.tolist()]
    of_frames = (sizes.amax(-2).flip(-1) + 1).tolist()
    counts = torch.as_tensor(made["num_frames_per_video"]).tolist()
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return [(count, *of_frames[start]) for count, start in zip(counts, starts, strict=True)]


def _larger(video_processor: Any, settings: Mapping[str, Any], zoom: Grid) -> dict[str, Any]:
    """Settings that make frames of one size so many times as large."""
    changed: dict[str, Any] = {}
    for name in ("size", "crop_size"):
        size = settings.get(name)
        if not size:
            continue
        larger = copy.copy(size)
        for side, factor in (("height", zoom[1]), ("width", zoom[2]), ("shortest_edge", zoom[1])):
            if getattr(size, side, None):
                setattr(larger, side, factor * getattr(size, side))
        if getattr(size, "shortest_edge", None) and zoom[1] != zoom[2]:
            raise UnsupportedModelError(
                f"{type(video_processor).__name__} resizes videos by their shorter side; zoom {zoom} asks for other "
                "factors along rows and columns."
            )
        changed[name] = larger
    return changed


def _resized(video: Tensor, size: tuple[int, int], resample: Any) -> Tensor:
    """Frames in another size, in their own dtype."""
    named = str(getattr(resample, "value", resample))
    mode = "bilinear" if named in ("2", "bilinear") else "bicubic"
    pixels = F.interpolate(video.float(), size=size, mode=mode, antialias=True, align_corners=False)
    if video.is_floating_point():
        return pixels.to(video.dtype)
    return pixels.round().clamp(0, 255).to(video.dtype)
