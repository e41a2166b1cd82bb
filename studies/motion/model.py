"""The small model as one that takes videos: LLaVA-NeXT-Video's classes around the parts that ship."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

import flexkit
from flexkit.grids import Grid
from flexkit.processing.views.videos import ClipView, frames_between
from flexkit.visual_search import Clip, load_model
from flexkit.visual_search.clip import SAMPLED
from flexkit.visual_search.model import CELLS, IMAGE_TOKEN, LOW_RES, build_processor

ZOOM = (4, 3, 3)
"""Along frames, rows and columns: 16 frames for the 4 that are sampled, of 192 x 192 pixels for 64 x 64."""
CELLS_READ = 2
"""Of the 64 of each frame that is sampled."""
CONFIG = flexkit.FlexConfig(start_layer=1, zoom=ZOOM, policy=flexkit.TopK(CELLS_READ))
"""As the model that ships: the first layer's map finds an object by its colour, so the second reads."""
_PIXELS = "pixel_values_videos"


def build_model(config: flexkit.FlexConfig = CONFIG) -> LlavaNextVideoForConditionalGeneration:
    """The model that ships, patched for videos, with all of its weights: it was trained on pictures.

    Parameters
    ----------
    config : FlexConfig
        How it selects and reads.
    """
    shipped, _ = load_model()
    own = shipped.config
    described = LlavaNextVideoConfig(
        vision_config=own.vision_config,
        text_config=own.text_config,
        video_token_index=own.image_token_id,
        image_token_index=own.text_config.vocab_size,  # no token: it takes videos alone
        vision_feature_layer=own.vision_feature_layer,
        vision_feature_select_strategy=own.vision_feature_select_strategy,
        spatial_pool_stride=1,
        tie_word_embeddings=True,
    )
    model = LlavaNextVideoForConditionalGeneration(described).eval()
    flexkit.patch_model(model, config, trained=True)
    model.load_state_dict(shipped.state_dict(), strict=False)  # it has a token of its own, which no video needs
    return model


class _Frames:
    """What :class:`ClipView` needs of a video processor, by an image processor: those of videos need torchvision."""

    def __init__(self, image_processor: Any) -> None:
        self._image_processor = image_processor

    def _preprocess(self, videos: Sequence[Tensor], **settings: Any) -> dict[str, list[Tensor]]:
        """Videos ``(frames, channels, height, width)``."""
        return {_PIXELS: [self.shown(video.movedim(1, -1).numpy(), **settings) for video in videos]}

    def shown(self, frames: Any, **settings: Any) -> Tensor:
        """Arrays ``(height, width, 3)`` as the model takes them."""
        images = [Image.fromarray(frame) for frame in frames]
        pixels: Tensor = self._image_processor(images, return_tensors="pt", **settings)["pixel_values"]
        return pixels


def high_res_frames(zoom: Grid) -> Tensor:
    """``(frames,)``, int64: indices of the frames of a clip that its high-res view has."""
    return frames_between(torch.tensor(SAMPLED), zoom[0], 1)


class ClipProcessor:
    """Inputs of both views, of clips and texts.

    Parameters
    ----------
    zoom : tuple of int
        Along frames, rows and columns.
    """

    def __init__(self, zoom: Grid = ZOOM) -> None:
        processor = build_processor()
        self.zoom, self.tokenizer, self._frames = zoom, processor.tokenizer, _Frames(processor.image_processor)

    def __call__(self, clips: Sequence[Clip], texts: Sequence[str], *, in_sequence: bool = False) -> dict[str, Any]:
        """Prompts, the frames that are sampled, and the tiles of the high-res view, painted when they are read.

        Parameters
        ----------
        clips : sequence of Clip
            As many as texts.
        texts : sequence of str
            What stands behind the clip.
        in_sequence : bool
            Whether the tiles stand in the sequence, as frames behind those that are sampled.
        """
        sampled = torch.stack([self._frames.shown(clip.read(SAMPLED)) for clip in clips])
        views = [self._view(clip) for clip in clips]
        if in_sequence:
            count = views[0].frames * self.zoom[1] * self.zoom[2]
            tiles = torch.stack([view.read(0, range(count))[0] for view in views])
            sampled = torch.cat([sampled, tiles], dim=1)
        marks = IMAGE_TOKEN * (sampled.shape[1] * CELLS**2)
        inputs = self.tokenizer([f"{marks} {text}" for text in texts], padding=True, return_tensors="pt")
        inputs = {**inputs, _PIXELS: sampled}
        inputs.pop("token_type_ids", None)
        return inputs if in_sequence else {**inputs, "hd_frames": views}

    def _view(self, clip: Clip) -> ClipView:
        height, width = (LOW_RES * factor for factor in self.zoom[1:])
        settings = {"size": {"height": height, "width": width}}
        return ClipView(clip, high_res_frames(self.zoom), self._frames, settings, self.zoom[1:])
