"""A page to leaf through words and layers, in one file that needs nothing else."""

import base64
import json
from collections.abc import Sequence
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flexkit.tracing import Trace
from flexkit.viz.looks import Look, Looks

__all__ = ["selection_page"]

_TEMPLATE = Path(__file__).with_name("page.html")
_AS_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}
"""What HTML may take for markup, as JSON may spell it too."""
_LONGEST = 1024
"""Longer side in pixels of the picture in the page."""


def selection_page(
    trace: Trace,
    image: Image.Image | Sequence[Image.Image],
    path: str | PathLike[str],
    *,
    words: Sequence[str] | None = None,
    question: str = "",
    row: int = 0,
    image_index: int = 0,
) -> None:
    """Write a page with the picture, a slider for words and one for layers; of a video, one for its frames.

    It is one file, which a browser opens from disk and without a network.

    Parameters
    ----------
    trace, image, words, row, image_index
        As for :func:`flexkit.plot_selection`.
    path : str or os.PathLike
        Of the file.
    question : str
        To stand above the picture.

    Raises
    ------
    ConfigError
        If the trace is empty, lacks the batch row, there are too few words, or not as many pictures as frames.
    """
    looks = Looks.of(trace, words, row=row, image=image_index)
    data = {
        "question": question,
        "words": looks.words,
        "layers": looks.layers,
        "pictures": [_picture(shown) for shown in looks.pictures(image)],
        "looks": {
            f"{looks.steps.index(step)} {looks.layers.index(layer)} {frame}": _look(own)
            for (step, layer), look in looks.looks.items()
            for frame, own in enumerate([look] if looks.frames is None else look.frames())
        },
    }
    before, after = _TEMPLATE.read_text(encoding="utf-8").split("@DATA@")
    # As bytes before the file is opened: what cannot be written must not leave an empty one.
    Path(path).write_bytes((before + _script(data) + after).encode())


def _picture(image: Image.Image) -> str:
    shown = image.convert("RGB")
    shown.thumbnail((_LONGEST, _LONGEST))
    file = BytesIO()
    shown.save(file, format="JPEG", quality=90)
    return "data:image/jpeg;base64," + _encoded(file.getvalue())


def _look(look: Look) -> dict[str, Any]:
    return {
        "mask": _encoded(np.packbits(look.mask).tobytes()),
        "maskGrid": look.mask.shape,
        "scores": _encoded((255 * look.scores).round().astype(np.uint8).tobytes()),
        "scoreGrid": look.scores.shape,
        "fraction": look.fraction,
        "shut": look.shut,
    }


def _script(data: Any) -> str:
    """JSON that can stand in an HTML page: ASCII, lone surrogates and line separators as escapes, and no markup."""
    return json.dumps(data, allow_nan=False).translate(_AS_ESCAPES)


def _encoded(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
