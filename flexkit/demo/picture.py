"""Reading a user's picture, whatever its mode, orientation and size."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flexkit.errors import HighResInputError

__all__ = ["read_picture"]

_LONGEST = 4096


def read_picture(path: Path) -> Image.Image:
    """Read a picture as a viewer would show it.

    Parameters
    ----------
    path : pathlib.Path
        Of any file that PIL reads; of several frames the first.

    Returns
    -------
    PIL.Image.Image
        RGB: turned upright, on white where it is transparent, not longer than 4096 pixels.

    Raises
    ------
    HighResInputError
        If there is no such file, or it is no picture.
    """
    if not path.is_file():
        raise HighResInputError(f"there is no file {str(path)!r}; give the path of a picture.")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as opened:
            image = _in_colour(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HighResInputError(f"{str(path)!r} cannot be read as a picture: {error}") from error
    image.thumbnail((_LONGEST, _LONGEST))
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _in_colour(image: Image.Image) -> Image.Image:
    """RGBA; of numbers that are no bytes the whole range is shown."""
    if image.mode[0] in "IF":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
        span = float(np.ptp(values)) or 1.0
        image = Image.fromarray((255 * (values - values.min()) / span).astype(np.uint8))
    return image.convert("RGBA")
