"""Tiny models with random weights, one for each structure that flexkit must cope with, and prompts for them."""

import transformers as tf

from tests.zoo.anyres import ANYRES
from tests.zoo.cross import CROSS
from tests.zoo.discrete import DISCRETE
from tests.zoo.encoder_decoder import ENCODER_DECODER
from tests.zoo.family import END, IMAGE, PAD, START, VIDEO, VOCABULARY, Family, Grid, cast, copied
from tests.zoo.few import FEW
from tests.zoo.glm import GLM
from tests.zoo.granite import GRANITE
from tests.zoo.minicpm import MINICPM
from tests.zoo.ocr import DEEPSEEK_OCR2, OCR
from tests.zoo.prompts import Row, low_res, prompt
from tests.zoo.qwen import QWEN
from tests.zoo.raster import RASTER
from tests.zoo.raw import RAW
from tests.zoo.refused import REFUSED
from tests.zoo.resamplers import RESAMPLERS
from tests.zoo.sized import SIZED
from tests.zoo.sparse import SPARSE
from tests.zoo.squares import SQUARES
from tests.zoo.tiles import TILES
from tests.zoo.timm_towers import TIMM
from tests.zoo.tiny import TEXT, VISION
from tests.zoo.towers import TOWERS

__all__ = [
    "CONTEXT",
    "END",
    "FAMILIES",
    "IMAGE",
    "IN_SEQUENCE",
    "MAIN",
    "PAD",
    "REFUSED",
    "START",
    "TEXT",
    "VIDEO",
    "VIDEOS",
    "VISION",
    "VOCABULARY",
    "ZOO",
    "Family",
    "Grid",
    "Row",
    "cast",
    "copied",
    "low_res",
    "prompt",
]

FAMILIES = {family.name: family for family in FEW}
"""Those that the laws are tried on in depth."""
CONTEXT = {family.name: family for family in (*CROSS, *ENCODER_DECODER, *RESAMPLERS, DEEPSEEK_OCR2)}
"""Those whose attention reads the image from a context beside the decoder's sequence."""
MAIN = ("llava", "qwen2_5_vl", "gemma3")
"""Families that differ in structure; the others differ from these in their language model only."""


def _known(name: str) -> bool:
    """Whether the transformers that is installed has this model type, or the one that it is a variant of."""
    return any(f"{name}-".startswith(f"{model_type}-") for model_type in tf.CONFIG_MAPPING)


ZOO = {
    family.name: family
    for family in (
        *FEW,
        *TOWERS,
        *TIMM,
        *OCR,
        *MINICPM,
        *GRANITE,
        *QWEN,
        *GLM,
        *RASTER,
        *SPARSE,
        *SQUARES,
        *TILES,
        *ANYRES,
        *SIZED,
        *RAW,
        *DISCRETE,
        *CROSS,
        *ENCODER_DECODER,
        *RESAMPLERS,
        DEEPSEEK_OCR2,
    )
    if _known(family.name)
}
"""All kinds that transformers has."""
VIDEOS = {f"{name}-video": family.of_videos() for name, family in ZOO.items() if family.video is not None}
"""Those that take videos, with a video wherever there was an image."""
ZOO |= VIDEOS
IN_SEQUENCE = {name: family for name, family in ZOO.items() if name not in CONTEXT}
"""Those whose image tokens stand in the decoder's own sequence."""
