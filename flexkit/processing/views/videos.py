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
from flexkit.errors import HighResInputError, UnsupportedModelError
from flexkit.grids import Grid, Pair, split_tiles
from flexkit.processing.outputs import like
from flexkit.processing.resizing import tell_enlarged
from flexkit.processing.source_overviews import clips_of

__all__ = ["ClipView", "frames_between", "in_both_views"]

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
    between, kind = zoom[0], type(video_processor)

    def preprocess(videos: Any, *args: Any, **options: Any) -> Any:
        low, chosen, shown = copy.copy(video_processor), list[Tensor](), dict[Any, Any]()
        sources = clips_of(videos)
        told = dict[str, Any]()

        def sample_frames(*given: Any, **settings: Any) -> Any:
            indices = video_processor.sample_frames(*given, **settings)
            chosen.append(torch.as_tensor(indices))
            return indices

        def resize(videos: Tensor, **settings: Any) -> Any:
            white = video_processor.resize(torch.ones_like(videos), **settings).flatten(0, -3).any(0)
            shown[videos.shape[-2:]] = int(white.any(1).sum()), int(white.any(0).sum())
            return video_processor.resize(videos, **settings)

        def process(videos: Any, **settings: Any) -> Any:
            told.update(_uncompressed(settings))
            return kind._preprocess(low, videos, **told)

        low.sample_frames, low.resize, low._preprocess = sample_frames, resize, process
        if sources:
            low._decode_and_sample_videos = _decoded
        made = low.preprocess(videos, *args, **options)
        if between > 1 and not chosen:
            raise HighResInputError(
                f"a zoom of {between} in time reads frames between those of the low-res view, and this one takes all "
                "that there are: let the video processor choose, with do_sample_frames=True and fps or num_frames."
            )
        together = getattr(video_processor, "temporal_patch_size", None) or 1
        indices = [frames_between(each, between, together) for each in chosen]
        if sources and not any(name in made for name in _SIZED):
            larger = told | _larger(video_processor, told, zoom)
            every = (torch.arange(len(source)) for source in sources)
            high_res["hd_frames"] = [
                ClipView(source, own.clamp(0, len(source) - 1), video_processor, larger, (zoom[1], zoom[2]))
                for source, own in zip(sources, indices or every, strict=True)
            ]
            return made
        wanted, high = iter(indices), copy.copy(video_processor)
        if sources:
            high._decode_and_sample_videos = _decoded

        def sample_more(metadata: Any, **_: Any) -> Any:
            return next(wanted).clamp(0, metadata.total_num_frames - 1).numpy()

        if between > 1:
            high.sample_frames = sample_more
        high._preprocess = lambda videos, **settings: _enlarged(video_processor, videos, settings, made, shown, zoom)
        views = high.preprocess(videos, *args, **options)
        for name in (name for name in _KEPT if name in views):
            value = views[name]
            in_tensors = isinstance(value, Tensor) or (isinstance(value, list) and isinstance(value[0], Tensor))
            high_res[f"hd_{name}"] = like(value if in_tensors else torch.as_tensor(value), made[name])
        return made

    both = copy.copy(video_processor)
    both.preprocess = preprocess
    return both


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
