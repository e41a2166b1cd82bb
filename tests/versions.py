"""What earlier versions of transformers do otherwise."""

import pytest
import transformers
from packaging.version import Version


def since(version: str, reason: str) -> pytest.MarkDecorator:
    """Skip a test with versions of transformers before ``version``."""
    return pytest.mark.skipif(Version(transformers.__version__) < Version(version), reason=reason)


expands_images_by_row = since("5.23", "earlier versions repeat pixels image by image, whatever row an image is in")
resets_by_emptying = since("5.23", "earlier versions reset a growing cache to zeros of the same length")
finds_second_images = since("5.23", "earlier versions of Gemma 3 mask the image of a later turn otherwise")
