"""Models that turn a picture into words of their own vocabulary, and embed those."""

from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.zoo.family import END, IMAGE, START, VOCABULARY, Family, Grid
from tests.zoo.sized import picture
from tests.zoo.tiny import TEXT, config

__all__ = ["DISCRETE"]

_CODES = 64
_TEXT: dict[str, Any] = {**TEXT, "vocab_size": VOCABULARY + _CODES}
_LINE_END = 94
_CODEBOOK: dict[str, Any] = dict(embed_dim=4, latent_channels=4, base_channels=32, num_res_blocks=1)
"""Sizes of an encoder to discrete codes; its group norms need 32 channels."""


def _chameleon() -> tf.PreTrainedConfig:
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    codes = {f"IMGIMG{str(code).translate(letters)}Z": VOCABULARY + code for code in range(_CODES)}
    return config(
        "chameleon",
        **_TEXT,
        vocabulary_map={"<image>": IMAGE, **codes},
        vq_config={**_CODEBOOK, "num_embeddings": _CODES, "resolution": 12, "channel_multiplier": [1, 1, 1]},
    )


def _emu3() -> tf.PreTrainedConfig:
    codes = {f"<|visual token {code:06}|>": VOCABULARY + code for code in range(_CODES)}
    return config(
        "emu3",
        text_config=_TEXT,
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": _LINE_END, **codes},
        vq_config={
            **_CODEBOOK,
            "codebook_size": _CODES,
            "channel_multiplier": [1, 1, 1],
            "temporal_downsample_factor": 2,
            "attn_resolutions": [],
            "hidden_size": 32,
        },
    )


def _square(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    size = settings.vq_config.resolution
    return {"pixel_values": torch.randn(1, 3, size * zoom[0], size * zoom[1])}


def _picture(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    return picture(grid, zoom, 2 ** (len(settings.vq_config.channel_multiplier) - 1))


def _with_line_ends(grid: Grid) -> list[int]:
    """A placeholder behind every row, for the embedding of the line's end."""
    return [START, *[IMAGE] * (grid[0] * (grid[1] + 1)), END]


DISCRETE = (
    Family("chameleon", _chameleon, _square),
    # Convolutions and group norms see the padding of a smaller picture in a batch: only one size here.
    Family("emu3", _emu3, _picture, grid=(2, 3), tokens=_with_line_ends),
)
