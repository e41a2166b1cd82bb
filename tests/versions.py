"""What earlier versions of transformers do otherwise."""

import pytest
import transformers
from packaging.version import Version


def since(version: str, reason: str) -> pytest.MarkDecorator:
    """Skip a test with versions of transformers before ``version``."""
    return pytest.mark.skipif(Version(transformers.__version__) < Version(version), reason=reason)


expands_images_by_row = since("5.23", "earlier versions repeat pixels image by image, whatever row an image is in")
resets_by_emptying = since("5.23", "earlier versions reset a growing cache to zeros of the same length")
runs_images_in_chunks = since("5.23", "earlier versions run a prompt in chunks only if it has no image")
crops_windows = since("5.23", "earlier versions cut the windows of Gemma 3 off too far when an assistant was wrong")
quantises_to_floats = since("5.23", "earlier versions have no 8-bit floats for caches")
tells_images_apart = since("5.23", "earlier MiniMax M3 mixes the images of a call, MiniCPM-V wants one size")
finds_second_images = since("5.23", "earlier versions of Gemma 3 mask the image of a later turn otherwise")
