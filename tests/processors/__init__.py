"""Tiny processors for the tiny models of the zoo, one for each model type."""

from tests.processors.context import CONTEXT
from tests.processors.grids import GRIDS
from tests.processors.kind import TORCHVISION, TinyProcessor
from tests.processors.sized import SIZED
from tests.processors.squares import SQUARES
from tests.processors.tiles import TILES

__all__ = ["PROCESSORS", "TORCHVISION", "TinyProcessor"]

PROCESSORS = {tiny.model_type: tiny for tiny in (*SQUARES, *TILES, *GRIDS, *SIZED, *CONTEXT)}
