"""Videos: as patches in one list, as frames of a tower's size, or as frames with the place of each patch."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.grids import Grid, split_tiles, stitch_tiles
from flexkit.patching.geometry.base import Declared, Geometry, cells_of_image, features_owner, image_features
from flexkit.patching.geometry.fixed_grid import FixedGrid
from flexkit.patching.geometry.patch_lists import DynamicGrid, MergedGrid, PositionedPatches, merge_size

__all__ = [
    "FixedFrames",
    "MarkedVideo",
    "MergedVideo",
    "PatchedVideo",
    "PositionedVideo",
    "UnmarkedGrid",
]


class Video(Geometry):
    """What all videos have in common: the model's method for them, the id of their tokens, and time."""

    features, token, axes = "get_video_features", "video_token_id", 3


class PatchedVideo(Video, DynamicGrid):
    """Patches of all videos in one list, frame by frame.

    Parameters
    ----------
    cell : callable
        From the model's config to the side of one cell in patches.
    frames : callable, optional
        From the model's config to how many frames of patches become one of cells; by default each does.
    apart : bool
        Whether the tower sees every frame by itself, so that one can be encoded without the others.
    """

    inputs = ("pixel_values_videos", "video_grid_thw")
    size_input = "video_grid_thw"

    def __init__(
        self,
        cell: Callable[[Any], int] = merge_size,
        frames: Callable[[Any], int] = lambda config: 1,
        apart: bool = True,
    ) -> None:
        super().__init__(cell)
        self._frames, self.whole_frames = frames, apart

    def cell(self, config: Any) -> Grid:
        return self._frames(config), *super().cell(config)

    def cut(self, inputs: Mapping[str, Tensor], zoom: Grid) -> list[tuple[Tensor, ...]] | None:
        if not self.whole_frames:
            return None
        patches, sizes = (inputs[name] for name in self.inputs)
        videos = torch.split(patches, sizes.prod(-1).tolist())
        of_frames = sizes.clone()
        of_frames[:, 0] = 1
        return [
            (video.reshape(frames, -1, *video.shape[1:]), size.expand(frames, -1))
            for video, size, frames in zip(videos, of_frames, sizes[:, 0].tolist(), strict=True)
        ]

    def encode_tiles(self, model: PreTrainedModel, tiles: Sequence[Tensor]) -> Tensor:
        patches, sizes = tiles
        tokens = torch.cat(self.encoded(model, dict(zip(self.inputs, (patches.flatten(0, 1), sizes), strict=True))))
        return tokens.view(len(patches), -1, tokens.shape[-1])


class UnmarkedGrid(DynamicGrid):
    """A dynamic grid whose image tokens are those outside of the marks of videos (GLM-V)."""

    def image_tokens(
        self, model: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None, token: str | None = None
    ) -> Tensor:
        found = partial(super().image_tokens, model, input_ids, inputs_embeds)
        return found(token) if token else found() & ~_in_video(found)


class MarkedVideo(PatchedVideo):
    """Videos whose tokens are those of images, between a mark of their begin and one of their end (GLM-V)."""

    token = "image_token_id"

    def image_tokens(
        self, model: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None, token: str | None = None
    ) -> Tensor:
        found = partial(super().image_tokens, model, input_ids, inputs_embeds)
        return found(token) if token else found() & _in_video(found)


def _in_video(found: Callable[[str], Tensor]) -> Tensor:
    """``(batch, length)``, bool: what stands behind more marks of a video's begin than of an end."""
    return found("video_start_token_id").cumsum(-1) > found("video_end_token_id").cumsum(-1)


class MergedVideo(Video, MergedGrid):
    """Videos that say how many patches a side become one cell (VideoLLaMA 3)."""

    inputs = (*PatchedVideo.inputs, "video_merge_sizes")
    size_input = PatchedVideo.size_input

    def cell(self, config: Any) -> Grid:
        return 1, 1, 1

    def check_low_res(self, model: PreTrainedModel, inputs: Mapping[str, object], grids: Sequence[Grid]) -> None:
        kept = inputs.get("video_compression_mask")
        if isinstance(kept, Tensor) and not bool(kept.all()):
            raise HighResInputError(
                f"video_compression_mask leaves out {int((~kept.bool()).sum())} of the low-res tokens, and a high-res "
                "view is read by all of them; call the processor with use_token_compression=False."
            )
        super().check_low_res(model, inputs, grids)


class FixedFrames(Video, FixedGrid):
    """Videos ``(videos, frames, channels, height, width)`` whose frames have the size that a tower takes.

    Every frame of the high-res view is cut into tiles, and each is encoded as a frame.

    Parameters
    ----------
    tokens : callable
        From the model's config to the number of cells of one frame's grid.
    before : int
        Tokens of a frame in front of its cells.
    behind : int
        Tokens behind all frames of a video.
    """

    inputs = ("pixel_values_videos",)

    def __init__(self, tokens: Callable[[Any], int], *, before: int = 0, behind: int = 0) -> None:
        super().__init__(tokens)
        self._before, self._behind = before, behind

    def declared(self, model: PreTrainedModel, zoom: Grid) -> Mapping[str, Declared]:
        view = super().declared(model, zoom[-2:])["pixel_values"]
        return {self.inputs[0]: Declared(("videos", "frames", *view.axes[1:]), meaning=view.meaning)}

    def grids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], zoom: Grid) -> list[Grid]:
        pixels = inputs[self.inputs[0]]
        if pixels.shape[1] % zoom[0]:
            raise HighResInputError(
                f"hd_{self.inputs[0]} has shape {tuple(pixels.shape)}; expected a number of frames divisible by "
                f"{zoom[0]}."
            )
        return [(pixels.shape[1] // zoom[0], *self.grid(model))] * len(pixels)

    def layout(self, model: PreTrainedModel, grid: Grid) -> Tensor:
        frames, cells = grid[0], math.prod(grid[1:])
        of_frame = torch.arange(self._before + cells) >= self._before
        return torch.nn.functional.pad(of_frame.repeat(frames), (0, self._behind))

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Grid], zoom: Grid
    ) -> list[Tensor]:
        videos = (self.encode_tiles(model, tiles) for tiles in self.cut(inputs, zoom))
        frames = (rearrange(video, "(f t) n d -> f t n d", t=math.prod(zoom[-2:])) for video in videos)
        return [stitch_tiles(video, self.grid(model), zoom[-2:]).flatten(0, 2) for video in frames]

    def cut(self, inputs: Mapping[str, Tensor], zoom: Grid) -> list[tuple[Tensor, ...]]:
        return [(split_tiles(video, zoom[-2:]).flatten(0, 1),) for video in inputs[self.inputs[0]]]

    def encode_tiles(self, model: PreTrainedModel, tiles: Sequence[Tensor]) -> Tensor:
        (frames,) = tiles
        # Earlier versions of transformers call them pixel_values here, and put what is behind all frames there later.
        name, *_ = inspect.signature(getattr(features_owner(model, self.features), self.features)).parameters
        tokens = torch.cat(image_features(model, self.features, **{name: frames[None]}))
        cells = cells_of_image(tokens, self.layout(model, (len(frames), *self.grid(model))))
        return cells.view(len(frames), -1, tokens.shape[-1])


class PositionedVideo(Video, PositionedPatches):
    """Frames ``(frames, patches, width)`` of all videos, with the place of each patch (Gemma 4)."""

    inputs = ("pixel_values_videos", "video_position_ids", "num_frames_per_video")
    size_input = "video_position_ids"

    def cell(self, config: Any) -> Grid:
        return 1, *super().cell(config)

    def declared(self, model: PreTrainedModel, zoom: Grid) -> Mapping[str, Declared]:
        return {**super().declared(model, zoom), self.inputs[2]: Declared(("videos",), "sizes", "one for each video")}

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], prefix: str) -> list[Grid]:
        sizes, counts = super().sizes(model, inputs, prefix), inputs[self.inputs[2]].tolist()
        if sum(counts) != len(sizes):
            raise HighResInputError(
                f"{prefix}{self.inputs[2]} is {counts}; expected numbers that add up to the {len(sizes)} frames of "
                f"{prefix}{self.inputs[0]}."
            )
        found = []
        for count in counts:
            own, sizes = sizes[:count], sizes[count:]
            if len(set(own)) > 1:
                raise HighResInputError(
                    f"{prefix}{self.size_input} has frames of {own} patches in one video; expected one size."
                )
            found.append((count, *own[0]))
        return found
