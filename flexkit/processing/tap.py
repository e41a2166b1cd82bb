"""What a processor asks of its image processor is asked again for the high-res view."""

import copy
from collections import ChainMap
from typing import Any

from transformers.image_utils import make_flat_list_of_images

from flexkit.processing.reading import read_images
from flexkit.processing.views import choose_view
from flexkit.zoom import Pair

__all__ = ["tap"]


def tap(processor: Any, zoom: Pair) -> tuple[Any, dict[str, Any]]:
    """A copy of a processor that does the same, and a place for the high-res inputs that it makes on the way.

    The processor itself stays as it is, so that calls from several threads do not meet.

    Parameters
    ----------
    processor : transformers.ProcessorMixin
        A processor with an image processor.
    zoom : tuple of int
        Along rows and columns.

    Returns
    -------
    processor : transformers.ProcessorMixin
        The copy, for one call.
    high_res : dict
        Empty until the copy processes images, then the high-res inputs.
    """
    image_processor = processor.image_processor
    view = choose_view(image_processor)
    high_res: dict[str, Any] = {}

    def fetch_images(images: Any) -> Any:
        return read_images(images, image_processor)

    def preprocess(images: Any, *args: Any, **options: Any) -> Any:
        images = fetch_images(images)
        low_res = image_processor.preprocess(images, *args, **options)
        settings = ChainMap(options, vars(image_processor))
        reading = {name: settings.get(name) for name in ("do_convert_rgb", "input_data_format")}
        flat = make_flat_list_of_images(images)
        prepared = [image_processor.process_image(image, **reading) for image in flat]
        if prepared:
            again = {**options, "input_data_format": "channels_first"}
            high_res.update(view(image_processor, prepared, low_res, again, zoom))
        return low_res

    tapped = copy.copy(processor)
    tapped.image_processor = copy.copy(image_processor)
    tapped.image_processor.fetch_images = fetch_images
    tapped.image_processor.preprocess = preprocess
    return tapped, high_res
