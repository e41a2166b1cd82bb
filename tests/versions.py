"""What earlier versions of transformers do otherwise."""

from collections.abc import Iterable
from typing import Any

import pytest
import transformers
from packaging.version import Version


def before(version: str) -> bool:
    """Whether transformers is older than ``version``."""
    return Version(transformers.__version__) < Version(version)


def since(version: str, reason: str) -> pytest.MarkDecorator:
    """Skip a test with versions of transformers before ``version``."""
    return pytest.mark.skipif(before(version), reason=reason)


def marked(names: Iterable[str], **marks: pytest.MarkDecorator) -> list[Any]:
    """Names as parameters of a test, some of them marked."""
    return [pytest.param(name, marks=marks.get(name, ())) for name in names]


expands_images_by_row = since("5.23", "earlier versions repeat pixels image by image, whatever row an image is in")
resets_by_emptying = since("5.23", "earlier versions reset a growing cache to zeros of the same length")
runs_images_in_chunks = since("5.23", "earlier versions run a prompt in chunks only if it has no image")
crops_windows = since("5.23", "earlier versions cut the windows of Gemma 3 off too far when an assistant was wrong")
quantises_to_floats = since("5.23", "earlier versions have no 8-bit floats for caches")
tells_images_apart = since("5.23", "earlier MiniMax M3 mixes the images of a call, MiniCPM-V wants one size")
finds_second_images = since("5.23", "earlier versions of Gemma 3 mask the image of a later turn otherwise")
counts_positions_once = since("5.23", "earlier versions of GIT place decoded words twice as far behind the cache")
counts_patches_exactly = since("5.23", "earlier versions of Idefics 2 and Aria count patches in 16-bit floats")
places_embeddings = since("5.23", "earlier versions of Qwen place a prompt by its ids alone")
