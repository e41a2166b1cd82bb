"""GLM-V and what is built like it: patches in the order of the cells, marks of its own around images."""

import math
from typing import Any

from torch import Tensor

from tests.zoo.family import END, IMAGE, START, VIDEO, Grid
from tests.zoo.grids import grid_family
from tests.zoo.pixels import clip
from tests.zoo.tiny import MOE, MROPE

__all__ = ["GLM", "MARKS", "marked"]

MARKS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": 94,
    "video_end_token_id": 95,
}
_ROPE = {"rope_parameters": MROPE}
_PARTIAL = {"rope_parameters": {**MROPE, "partial_rotary_factor": 0.5}, "head_dim": 16}
_TOWER = {"image_size": 56}
_EXPERTS = {**MOE, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}


def marked(grid: Grid) -> list[int]:
    """The tokens of images, frame by frame, between the marks of a video."""
    frames, *cells = grid
    return [94, *[token for _ in range(frames) for token in (START, *[IMAGE] * math.prod(cells), END)], 95]


def _merged_frames(config: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """Two frames of patches for one of cells."""
    return clip(config, (2 * grid[0], *grid[1:]), zoom)


GLM = (
    grid_family("glm4v", _ROPE, _TOWER, tokens=MARKS, video_sequence=marked),
    grid_family("glm46v", _ROPE, _TOWER, tokens=MARKS, video_sequence=marked),
    grid_family("glmga", _ROPE, _TOWER, tokens=MARKS, video_sequence=marked),
    grid_family(
        "glm4v_moe",
        {**_PARTIAL, **_EXPERTS, "first_k_dense_replace": 1},
        _TOWER,
        tokens=MARKS,
        video_sequence=marked,
    ),
    grid_family("glm_ocr", _ROPE, _TOWER, tokens=MARKS, video_sequence=marked),
    grid_family(
        "ernie4_5_vl_moe",
        {
            "rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]},
            "moe_intermediate_size": [16, 16],
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "moe_k": 2,
        },
        tokens=MARKS,
        video=_merged_frames,
    ),
)
